"""TFDS folders that tests write themselves, without TensorFlow."""

import json

from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

_CORE = 'tensorflow_datasets.core.features.'
TEXT = {'pythonClassName': _CORE + 'text_feature.Text', 'text': {}}


def label(classes):
  """The feature of a label."""
  return {
      'classLabel': {'numClasses': str(classes)},
      'pythonClassName': _CORE + 'class_label_feature.ClassLabel'}


def record(features):
  """One example, as TFDS stores it."""
  example = tf_example_pb2.Example()
  for name, value in features.items():
    if isinstance(value, int):
      example.features.feature[name].int64_list.value.append(value)
    else:
      example.features.feature[name].bytes_list.value.append(value)
  return example.SerializeToString()


def write_split(folder, name, split, records):
  """One split in one file; returns what `dataset_info.json` says of it."""
  stem = f'{name.split("/")[0]}-{split}'
  path = folder / f'{stem}.array_record-00000-of-00001'
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for item in records:
    writer.write(record(item))
  writer.close()
  return {
      'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
      'name': split, 'numBytes': str(path.stat().st_size),
      'shardLengths': [str(len(records))]}


def write_texts(root, name, features, splits, version='1.0.0'):
  """A set of texts: `splits` is name -> list of {feature: text or number}."""
  folder = root / name / version
  folder.mkdir(parents=True)
  encode = lambda row: {
      k: v.encode() if isinstance(v, str) else v for k, v in row.items()}
  described = [
      write_split(folder, name, split, list(map(encode, rows)))
      for split, rows in splits.items()]
  (folder / 'dataset_info.json').write_text(json.dumps({
      'fileFormat': 'array_record', 'name': name.split('/')[0],
      'splits': described, 'version': version}))
  (folder / 'features.json').write_text(json.dumps({
      'featuresDict': {'features': features},
      'pythonClassName': _CORE + 'features_dict.FeaturesDict'}))
  return folder
