"""Data of a user's own: what is read, and what is refused."""

import csv
import io

from bpjax.train import data
from bpjax.train.data import own
from bpjax.train.data import sets
import numpy as np
from PIL import Image
import pyarrow
import pyarrow.parquet
import pytest


def _pixels(i, size=(4, 4)):
  return np.full((*size, 3), i % 256, np.uint8)


def _folder(path, splits=('train', 'test'), sizes=((4, 4),), mode='RGB'):
  for split in splits:
    for label, known in enumerate(('cat', 'dog')):
      folder = path / split / known
      folder.mkdir(parents=True)
      for i in range(6):
        size = sizes[i % len(sizes)]
        Image.fromarray(_pixels(20 * i + label, size)).convert(mode).save(
            folder / f'{i}.png')
  return path


def _table(path, rows):
  with open(path, 'w', encoding='utf-8', newline='') as file:
    csv.writer(file).writerows(rows)
  return str(path)


def test_folder_of_images(tmp_path):
  found = data.load(str(_folder(tmp_path)))
  assert found.classes == ('cat', 'dog') and found.num_classes == 2
  assert found.train.images.shape == (12, 4, 4, 3)
  assert found.train.images[7, 0, 0].tolist() == [21, 21, 21]
  assert found.test.labels.tolist() == [0] * 6 + [1] * 6
  assert found.validation is None


def test_folder_without_splits(tmp_path):
  found = data.load(f'{_folder(tmp_path, ("",))}/')
  assert len(found.test.labels) == 2 and len(found.train.labels) == 10
  again = data.load(str(tmp_path))
  assert np.array_equal(found.test.images, again.test.images)


def test_folder_with_validation_in_grey(tmp_path):
  _folder(tmp_path, ('train', 'val', 'test'), mode='L')
  found = data.load(str(tmp_path))
  assert found.validation.images.shape == (12, 4, 4, 1)
  held_out = data.load(str(tmp_path), validation=3)
  assert len(held_out.validation.labels) == 3
  assert len(held_out.train.labels) == 9


def test_images_are_scaled(tmp_path):
  _folder(tmp_path, sizes=((4, 8), (6, 6)))
  with pytest.raises(ValueError, match='several sizes.*`image_size`'):
    data.load(str(tmp_path))
  found = data.load(str(tmp_path), image_size=3)
  assert found.train.images.shape == (12, 3, 3, 3)
  # Every image has one colour, which scaling keeps.
  assert (found.train.images == found.train.images[:, :1, :1]).all()


def test_the_centre_is_taken():
  image = np.zeros((4, 8, 3), np.uint8)
  image[:, 2:6] = 200
  taken = own.to_array(Image.fromarray(image), 4, 4, 3)
  assert (taken == 200).all()


def test_deep_grey_keeps_its_range():
  deep = Image.fromarray(np.array([[0, 65535]], np.uint16))
  assert np.asarray(own.convert(deep, 1)).tolist() == [[0, 255]]


def test_large_folders_are_streamed(tmp_path, monkeypatch):
  monkeypatch.setattr(sets, '_MAX_DECODED_BYTES', 100)
  found = data.load(str(_folder(tmp_path)), image_size=4)
  batch = next(found.test.batches(12, train=False))
  assert batch['image'].shape == (12, 4, 4, 3)
  assert batch['label'].tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize('names', [
    ('train_images', 'train_labels', 'test_images', 'test_labels'),
    ('x_train', 'y_train', 'x_test', 'y_test')])
def test_arrays(tmp_path, names):
  x = np.arange(4 * 9, dtype=np.uint8).reshape(4, 3, 3)
  arrays = dict(zip(names, (x, [0, 1, 2, 0], x[:2], [1, 2])))
  np.savez(tmp_path / 'a.npz', **arrays)
  found = data.load(str(tmp_path / 'a.npz'))
  assert found.train.images.shape == (4, 3, 3, 1) and found.num_classes == 3
  assert found.test.labels.tolist() == [1, 2]


def test_rows_of_numbers_are_scaled_each():
  x = np.random.default_rng(0).normal(5, [1, 100], (60, 2))
  found = data.from_arrays((x, np.arange(60) % 2), (x, np.arange(60) % 2))
  assert found.image_shape == (2,)
  np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-5)
  np.testing.assert_allclose(found.std, x.std(0), rtol=1e-5)


def test_tables(tmp_path):
  rows = [('a', 'b', 'species', 'split')] + [
      (i, i * .5, ('oak', 'elm')[i % 2], 'test' if i < 4 else 'train')
      for i in range(12)]
  table = _table(tmp_path / 't.csv', rows)
  found = data.load(table, dataset_args={'label': 'species'})
  assert found.classes == ('elm', 'oak')
  assert found.test.labels.tolist() == [1, 0, 1, 0]
  assert found.test.images[2].tolist() == [2, 1]
  columns = {name: [r[i] for r in rows[1:]] for i, name in enumerate(rows[0])}
  pyarrow.parquet.write_table(
      pyarrow.table(columns), tmp_path / 't.parquet')
  other = data.load(
      str(tmp_path / 't.parquet'), dataset_args={'label': 'species'})
  for a, b in zip((*found.train, *found.test), (*other.train, *other.test)):
    np.testing.assert_array_equal(a, b)


def test_tables_of_texts(tmp_path):
  rows = [('sentence', 'label')] + [
      (f'{"good" if i % 2 else "bad"} film number {i}', i % 2)
      for i in range(24)]
  folder = tmp_path / 'films'
  folder.mkdir()
  for split in ('train', 'test'):
    _table(folder / f'{split}.csv', rows)
  found = data.load(
      str(folder), cache_dir=tmp_path / 'cache', length=8, vocabulary=60)
  assert found.asked.num_classes == 2 and found.train.tokens.shape == (24, 8)
  assert found.tokenizer


def test_code(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'mine_for_test.py').write_text(
      'import bpjax, numpy as np\n'
      'def make(n=4):\n'
      '  x, y = np.ones((n, 2)), np.arange(n) % 2\n'
      '  return bpjax.train.dataset((x, y), (x, y))\n'
      'def number():\n'
      '  return 3\n')
  found = data.load('mine_for_test.py:make', dataset_args={'n': 6})
  assert len(found.train.labels) == 6
  with pytest.raises(ValueError, match='must return a `bpjax.train.Dataset`'):
    data.load('mine_for_test.py:number')
  with pytest.raises(ValueError, match='raises TypeError'):
    data.load('mine_for_test.py:make', dataset_args={'m': 6})


@pytest.mark.parametrize('rows, words', [
    ([('a', 'label')], 'no rows below its header'),
    ([('a', 'a'), (1, 2)], 'different names'),
    ([('a', 'label'), (1, 2, 3)], '3 cells in row 1'),
    ([('a', 'b'), (1, 2)], "no column 'label'.*`dataset_args.label`"),
    ([('a', 'label'), (1, '')], 'without a class'),
    ([('a', 'label'), *((i, i + .5) for i in range(9))], 'holds classes'),
    ([('a', 'label'), *(('', i) for i in range(9))], 'no finite number'),
    ([('a', 'b', 'label'), *(('x', 1, i) for i in range(9))],
     "texts in the column 'a'"),
    ([('label',), *((i,) for i in range(9))], 'no column beside'),
    ([('a', 'split', 'label'), (1, 'tset', 2)], "'tset' in the column 'split'"),
])
def test_wrong_tables(tmp_path, rows, words):
  with pytest.raises(ValueError, match=words):
    data.load(_table(tmp_path / 't.csv', rows))


def test_wrong_folders(tmp_path):
  with pytest.raises(ValueError, match='a path where nothing lies'):
    data.load(str(tmp_path / 'none'))
  with pytest.raises(ValueError, match='no folders of a class'):
    data.load(str(tmp_path))
  (tmp_path / 'train' / 'cat').mkdir(parents=True)
  with pytest.raises(ValueError, match='not both of train and test'):
    data.load(str(tmp_path))
  _folder(tmp_path / 'other')
  image = tmp_path / 'other' / 'train' / 'cat' / '0.png'
  image.write_bytes(b'no image')
  with pytest.raises(ValueError, match='0.png cannot be read'):
    data.load(str(tmp_path / 'other'))
  (tmp_path / 'other' / 'test' / 'cow').mkdir()
  with pytest.raises(ValueError, match="class 'cow' in test"):
    data.load(str(tmp_path / 'other'))


def test_wrong_arrays(tmp_path):
  path = str(tmp_path / 'a.npz')
  np.savez(path, what=np.ones(3))
  with pytest.raises(ValueError, match='holds what; name its arrays'):
    data.load(path)
  np.savez(path, images=np.array([object()]), labels=[0])
  with pytest.raises(ValueError, match='without objects'):
    data.load(path)
  with pytest.raises(ValueError, match='integers from 0 on'):
    data.from_arrays((np.ones((2, 3)), [-1, 0]), (np.ones((2, 3)), [1, 0]))
  with pytest.raises(ValueError, match='2 train images and 3 train labels'):
    data.from_arrays((np.ones((2, 3)), [1, 0, 0]), (np.ones((2, 3)), [1, 0]))
  with pytest.raises(ValueError, match='not finite'):
    data.from_arrays((np.full((2, 3), np.nan), [1, 0]), (np.ones((2, 3)), [1, 0]))


def test_pictures_of_other_programs_are_not_opened(tmp_path):
  # Pillow starts a program for this format.
  path = tmp_path / 'a.png'
  path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n')
  with pytest.raises(ValueError, match='cannot be read'):
    own.open_image(path)


def test_a_data_set_of_the_library_datasets(tmp_path):
  datasets = pytest.importorskip('datasets')

  def made(columns, features):
    table = datasets.table.InMemoryTable(pyarrow.Table.from_pydict(
        columns, schema=features.arrow_schema))
    # With a fingerprint, as hashing a table fails beside pyarrow 26.
    return datasets.Dataset(
        table, info=datasets.DatasetInfo(features=features), fingerprint='0')

  label = datasets.ClassLabel(names=['no', 'yes'])
  texts = made(
      {'text': ['good', 'bad'] * 9, 'label': [1, 0] * 9},
      datasets.Features({'text': datasets.Value('string'), 'label': label}))
  datasets.DatasetDict({'train': texts, 'test': texts}).save_to_disk(
      str(tmp_path / 'texts'))
  found = data.load(
      str(tmp_path / 'texts'), cache_dir=tmp_path / 'cache', length=8,
      vocabulary=40)
  assert found.asked.num_classes == 2 and found.test.labels[0] == 1
  encoded = []
  for i in range(12):
    file = io.BytesIO()
    Image.fromarray(_pixels(i)).save(file, 'PNG')
    encoded.append({'bytes': file.getvalue(), 'path': None})
  images = made(
      {'image': encoded, 'label': [0, 1] * 6},
      datasets.Features({'image': datasets.Image(), 'label': label}))
  images.save_to_disk(str(tmp_path / 'images'))
  found = data.load(str(tmp_path / 'images'))
  assert found.classes == ('no', 'yes')
  assert found.train.images.shape == (10, 4, 4, 3)


if __name__ == '__main__':
  pytest.main([__file__])
