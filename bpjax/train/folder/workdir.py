"""The folder that a run leaves: config, metrics, summary and log.

Nothing that lies there is believed. A file that is not whole, or that does not
agree with the others, is named, with the way out; none is deleted for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import math
import os
import stat
from typing import Any

from bpjax.train import config as config_lib
from bpjax.train.folder import streams
from bpjax.train.folder import watching
import rich.console

_METRICS, _SUMMARY = 'metrics.jsonl', 'summary.json'
_CONFIG, _ENVIRONMENT = 'config.json', 'environment.json'
_TIMES = ('median_step_time', 'wall_time')  # Of a summary.
# What a summary copies out of the metrics' last lines.
_SPLITS = ('test', 'validation')


class DiskError(Exception):
  """Something could not be written or read; the run goes on once it can."""


@contextlib.contextmanager
def disk(what: str) -> Iterator[None]:
  """Turns an OSError into a DiskError that says what could not be done.

  Example:
    >>> with disk('metrics.jsonl cannot be written'):
    ...   file.write(text)
  """
  try:
    yield
  except OSError as error:
    raise disk_error(what, error.strerror or error) from error


def disk_error(what: str, why: Any) -> DiskError:
  """The error that says what could not be done, and why."""
  return DiskError(
      f'{what} ({why}); mend that, and the same command goes on from the last '
      'checkpoint.')


class Workdir:
  """One run's folder. Used as a context manager.

  Files: `config.json`, `environment.json` (what else changes results),
  `metrics.jsonl` (one object a line), `summary.json` (once the run is
  finished), `log.txt`, of texts `tokenizer.json`, and the folder `checkpoints`;
  what watchers write, such as the folder `tensorboard`, is a copy that is not read.
  A folder that was made, and is not claimed, is removed again.
  """

  def __init__(self, path: str, quiet: bool = False):
    """Makes the folder, and holds it against other processes.

    Args:
      path: of the folder.
      quiet: write to the log alone, and nothing to stderr.

    Raises:
      ValueError: if nothing can be written there, or another process runs in
        it.
    """
    if not path:
      raise ValueError(
          '`workdir` must be a folder, got an empty name; give one such as '
          'runs/digits.')
    self.path = os.path.abspath(os.path.expanduser(path))
    self._stderr = streams.Forgiving('stderr')
    self.console = rich.console.Console(
        file=self._stderr, highlight=False, quiet=quiet)
    self._quiet = quiet
    self._recorded = hashlib.blake2b(digest_size=16)
    self._made = []
    self._watchers = {}
    try:
      self._make_folder()
      self._log = self._locked_log()
    except BlockingIOError as error:
      raise ValueError(
          f'`workdir` {path!r} is in use by another process; wait for it, or '
          'choose another folder.') from error
    except OSError as error:
      self._remove_made()
      raise ValueError(
          f'`workdir` {path!r} cannot be written to ({_reason(error)}); choose '
          'a folder that you may write to.') from error

  def __enter__(self) -> Workdir:
    return self

  def __exit__(self, *error):
    try:
      with contextlib.suppress(DiskError):
        self._show('close')
      self._remove_made()
    finally:
      os.close(self._log)
      self._log = -1

  @property
  def checkpoints(self) -> str:
    """The folder of the checkpoints."""
    return self._file('checkpoints')

  @property
  def best(self) -> str:
    """The folder of the best epoch's checkpoint."""
    return self._file('best')

  def check(self, config: Mapping[str, Any]) -> None:
    """Raises ValueError if the folder holds a run with another config."""
    held = _read_json(self._file(_CONFIG))
    if held is None:
      for file in ('checkpoints', _METRICS, _SUMMARY, _CONFIG):
        if os.path.lexists(self._file(file)):
          raise ValueError(
              f'`workdir` {self.path!r} holds {file} without a readable '
              'config.json, so nobody can tell which run it is; choose another '
              'folder.')
      return
    # A field that is newer than the run was at its default.
    held = config_lib.to_json(config_lib.default()) | held
    if config_lib.goes_on(held, config):
      return
    difference = config_lib.difference(held, config)
    if difference:
      raise ValueError(
          f'`workdir` {self.path!r} holds a run with another config: '
          f'{difference}; choose another folder, or the same config.')

  def check_environment(self, environment: Mapping[str, Any]) -> None:
    """Compares what else changes results with what it was when the run began.

    Args:
      environment: from `bpjax.train.folder.environment`, or a part of it.

    Raises:
      ValueError: for a difference that changes results. One that may change
        their last bits is a warning.
    """
    path = self._file(_ENVIRONMENT)
    if not os.path.lexists(self._file(_CONFIG)):
      return
    if not os.path.lexists(path):
      self.warn(
          f'{path} is missing, so that nobody can tell whether JAX, the devices '
          'or the data are those that the run began with')
      return
    held = _read_json(path)
    if held is None:
      raise ValueError(
          f'{path} cannot be read, so that nobody can tell whether JAX and the '
          'data are those that the run began with; remove it if you know that '
          'they are.')
    for kind, values in environment.items():
      known = held.get(kind)
      known = known if isinstance(known, dict) else {}
      text = config_lib.difference(
          {k: known.get(k, 'absent') for k in values}, values)
      if text and kind == 'machine':
        self.warn(f'{text}: the last bits of the results may differ')
      elif text:
        raise ValueError(
            f'`workdir` {self.path!r} holds a run that began otherwise: {text}; '
            'choose another folder, or change it back.')

  def claim(
      self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Makes this the folder of a run that `check` allowed.

    Where that goes on for more epochs, the summary of the shorter run keeps its
    number of epochs in its name.

    Raises:
      DiskError: if it cannot be written.
    """
    held = _read_json(self._file(_CONFIG)) or {}
    longer = held.get('epochs', config['epochs']) != config['epochs']
    if longer and os.path.lexists(self._file(_SUMMARY)):
      with disk(f'{self._file(_SUMMARY)} cannot be renamed'):
        os.replace(self._file(_SUMMARY),
                   self._file(f'summary.{held["epochs"]}_epochs.json'))
    if longer:
      self._write(_CONFIG, _pretty(config))
    # The config comes last: a folder without it is nobody's.
    for name, value in ((_ENVIRONMENT, environment), (_CONFIG, config)):
      if not os.path.lexists(self._file(name)):
        self._write(name, _pretty(value))
    self._made = []

  @property
  def identity(self) -> str:
    """A hash of the config that the run began with."""
    return identity(self.path)

  def keep(self, name: str, text: str) -> None:
    """Keeps a text that a run has to find again when it goes on.

    Raises:
      ValueError: if the folder holds another one.
    """
    try:
      with open(self._file(name), encoding='utf-8') as file:
        held = file.read()
    except FileNotFoundError:
      self._write(name, text)
      return
    if held != text:
      raise ValueError(
          f'`workdir` {self.path!r} holds another {name} than this run makes, '
          'so its data are others; choose another folder.')

  def summary(self) -> dict[str, Any] | None:
    """The summary of a run that is finished, else None.

    One that is not whole, or does not agree with the metrics and the config, is
    set aside, with a warning, since the run makes it anew.
    """
    path = self._file(_SUMMARY)
    if not os.path.lexists(path):
      return None
    summary = read_summary(self.path)
    if summary is None:
      set_aside(
          path, 'is not whole or does not agree with metrics.jsonl and '
          'config.json', self.warn)
    return summary

  def finish(self, summary: Mapping[str, Any]) -> None:
    """Writes the summary, which says that the run is finished."""
    # As it will be read.
    summary = json.loads(json.dumps(_without_nan(summary)))
    self._write(_SUMMARY, _pretty(
        summary | {'digest': _digest(self.path, summary)}))

  def watch(self, names: Sequence[str], config: Mapping[str, Any]) -> None:
    """Shows what will be recorded to other programs; see `watching`.

    Args:
      names: who is shown it; one of `watching.DEFAULT` whose package is missing
        is left out, with a warning.
      config: the run's config.

    Raises:
      ValueError: for an unknown name, or a package that is missing.
    """
    watching.require(names)
    for name in names:
      try:
        self._watchers[name] = watching.make(name, self.path, config)
      except watching.Missing as error:
        self.warn(str(error).removesuffix('.'))

  def record(self, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends lines to the metrics, on the disk before it returns.

    A checkpoint that is saved afterwards can then count on them.
    """
    lines = list(lines)
    text = ''.join(f'{json.dumps(_without_nan(line))}\n' for line in lines)
    with self._writing(_METRICS, os.O_APPEND) as descriptor:
      _write_all(descriptor, text)
      os.fsync(descriptor)
    self._recorded.update(text.encode())
    self._show('add', lines)

  @property
  def recorded(self) -> str:
    """A hash of all lines of the metrics, as `cut_metrics` and `record` left them.
    """
    return self._recorded.hexdigest()

  def recorded_before(self, step: int) -> str:
    """The hash of the lines before a step, as they lie in the file."""
    return self._hash_before(step)[0].hexdigest()

  def metrics(self) -> list[dict[str, Any]]:
    """The lines of the metrics that are whole.

    Raises:
      ValueError: for anything but a last line that is cut short, with file,
        line and way out.
    """
    return read_metrics(self.path)

  def cut_metrics(self, step: int) -> None:
    """Removes the lines from `step` on, which the run writes again."""
    self._recorded, end = self._hash_before(step)
    with self._writing(_METRICS, 0) as descriptor:
      os.ftruncate(descriptor, end)
      os.fsync(descriptor)
    if self._watchers:
      self._show('begin', self.metrics())

  def log(self, message: str) -> None:
    """Writes one line to the log and to stderr.

    A stderr that cannot be written to does not stop a run; the log says so.
    """
    failed = self._stderr.failure
    if self._quiet:
      pass
    elif self.console.is_terminal:
      self.console.print(
          streams.printable(message), markup=False, soft_wrap=True)
    else:
      self._stderr.write(f'{streams.printable(message)}\n')
      self._stderr.flush()
    self._to_log(message)
    if self._stderr.failure and not failed:
      self._to_log(
          f'warning: stderr cannot be written to ({self._stderr.failure}); the '
          'run goes on, and this log alone tells of it')

  def warn(self, message: str) -> None:
    """Logs a warning."""
    self.log(f'warning: {message}.')

  def complain(self, message: str) -> None:
    """Logs what ends the run, also where the log or stderr cannot be written."""
    if self._stderr.failure:
      streams.put('stdout', message)
    else:
      streams.complain(message)
    with contextlib.suppress(DiskError):
      self._to_log(message)

  def urgent(self, message: str) -> None:
    """Logs without waiting for anybody, as `streams.urgent` prints."""
    with contextlib.suppress(DiskError):
      self._to_log(message)
    streams.urgent(message)

  def _show(self, what, *args):
    """Asks every watcher for something; one that fails is not asked again."""
    for name, watcher in list(self._watchers.items()):
      try:
        getattr(watcher, what)(*args)
      except Exception as error:
        if isinstance(error, MemoryError):  # Says nothing of the watcher.
          raise
        del self._watchers[name]
        with contextlib.suppress(Exception):
          watcher.close()
        why = getattr(error, 'strerror', None) or str(error).splitlines()
        why = why if isinstance(why, str) else ' '.join(why[:1])
        self.warn(
            f'`watch` of {name} failed ({why or type(error).__name__}); the run '
            'goes on without it, and metrics.jsonl holds everything')

  def _hash_before(self, step):
    """The hash of the lines before a step, and where they end."""
    lines, ends = _parse_metrics(self._file(_METRICS))
    end = ends[sum(line['step'] < step for line in lines)]
    digest = hashlib.blake2b(digest_size=16)
    if end:
      with disk(f'{self._file(_METRICS)} cannot be read'), open(
          self._file(_METRICS), 'rb') as file:
        digest.update(file.read(end))
    return digest, end

  def _file(self, name):
    return os.path.join(self.path, name)

  def _make_folder(self):
    """Makes what is missing of the path, and remembers it."""
    missing, path = [], self.path
    while not os.path.lexists(path):
      missing.append(path)
      path = os.path.dirname(path)
    for folder in reversed(missing):
      try:
        os.mkdir(folder)
        self._made.append(folder)
      except FileExistsError:  # Another process was faster.
        pass

  def _locked_log(self):
    """The log's descriptor, locked.

    Record locks go with the process, however it ends, and children do not
    inherit them.
    """
    path = self._file('log.txt')
    while True:
      new = not os.path.lexists(path)
      descriptor = _open(path, os.O_APPEND)
      try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have removed it.
        held = os.fstat(descriptor)
        if os.path.lexists(path) and os.path.samestat(held, os.lstat(path)):
          if new:
            self._made.append(path)
          return descriptor
      except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
          raise BlockingIOError() from error
        raise
      os.close(descriptor)

  def _remove_made(self):
    for path in reversed(self._made):
      with contextlib.suppress(OSError):  # It is not empty.
        if os.path.isdir(path):
          os.rmdir(path)
        else:
          os.unlink(path)
    self._made = []

  def _to_log(self, message):
    now = datetime.datetime.now().strftime('%Y-%m-%d %H:%M:%S')
    with disk(f'{self._file("log.txt")} cannot be written'):
      _write_all(self._log, f'{now} {streams.printable(message)}\n')

  @contextlib.contextmanager
  def _writing(self, name, flags):
    path = self._file(name)
    with disk(f'{path} cannot be written'):
      descriptor = _open(path, flags)
      try:
        yield descriptor
      finally:
        os.close(descriptor)

  def _write(self, name, text):
    """Replaces a file as a whole: a reader sees the old one or the new one."""
    temporary = self._file(f'.{name}.tmp')
    with disk(f'{self._file(name)} cannot be written'):
      with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
      try:
        with self._writing(f'.{name}.tmp', os.O_EXCL) as descriptor:
          _write_all(descriptor, text)
          os.fsync(descriptor)
        os.replace(temporary, self._file(name))
      except (OSError, DiskError):
        with contextlib.suppress(OSError):
          os.unlink(temporary)
        raise


class Follower(Workdir):
  """The folder as every process but the first has it: nothing is written.

  Complaints go to standard error, with the number of the process.
  """

  def __init__(self, path: str, index: int):  # pylint: disable=super-init-not-called
    self.path = os.path.abspath(os.path.expanduser(path))
    self._name = f'process {index}'
    self.console = rich.console.Console(quiet=True)

  def __exit__(self, *error):
    pass

  def check(self, config):
    pass

  def check_environment(self, environment):
    pass

  def claim(self, config, environment):
    pass

  def watch(self, names, config):
    pass

  @property
  def identity(self):
    return ''

  def keep(self, name, text):
    pass

  def summary(self):
    return None

  def finish(self, summary):
    pass

  def record(self, lines):
    pass

  @property
  def recorded(self):
    return ''

  def recorded_before(self, step):
    return ''

  def metrics(self):
    return []

  def cut_metrics(self, step):
    pass

  def log(self, message):
    pass

  def complain(self, message):
    streams.complain(f'{self._name}: {message}')

  def urgent(self, message):
    streams.urgent(f'{self._name}: {message}')


def set_aside(
    path: str, problem: str, warn: Callable[[str], None], kind: str = ''
) -> None:
  """Gives what cannot be used another name, with a warning that tells both.

  Example:
    >>> set_aside('checkpoints/3', 'is empty', print, 'checkpoint ')
    checkpoint checkpoints/3 is empty; it is kept as 3.unreadable and not used
  """
  other, number = f'{path}.unreadable', 1
  while os.path.lexists(other):
    number += 1
    other = f'{path}.unreadable.{number}'
  with disk(f'{path} {problem}, and it cannot be renamed'):
    os.rename(path, other)
  warn(f'{kind}{path} {problem}; it is kept as {os.path.basename(other)} and '
       'not used')


def read_summary(folder: str) -> dict[str, Any] | None:
  """The summary of a finished run; None where it does not count.

  It counts when it is whole, and agrees with the metrics and the config.

  Example:
    >>> read_summary('runs/digits')['test_accuracy']
    0.9666666666666667
  """
  summary = _read_json(os.path.join(folder, _SUMMARY))
  config = _read_json(os.path.join(folder, _CONFIG))
  if summary is None or config is None:
    return None
  try:
    lines = read_metrics(folder)
  except (ValueError, DiskError):
    return None
  last = {
      (line['split'], line.get('unit')): line for line in lines
      if line['step'] == lines[-1]['step']}
  expected = {field: config.get(field) for field in ('rule', 'seed', 'epochs')}
  expected['steps'] = lines[-1]['step'] if lines else None
  for split in _SPLITS:
    line = last.get((split, None), {})
    expected |= {f'{split}_{v}': line.get(v) for v in ('accuracy', 'loss')}
  if any(summary.get(k, 'absent') != v for k, v in expected.items()):
    return None
  if not isinstance(summary.get('units'), dict) or not isinstance(
      summary.get('alignment'), dict):
    return None
  if any(not isinstance(summary.get(k, 0.), (float, int, type(None)))
         for k in _TIMES):
    return None
  digest = summary.pop('digest', None)
  # Summaries of before there was a digest have none.
  if digest is not None and digest != _digest(folder, summary):
    return None
  return streams.printable(summary)


def read_metrics(folder: str) -> list[dict[str, Any]]:
  """The lines of a run's metrics; see `Workdir.metrics`.

  Example:
    >>> read_metrics('runs/digits')[0]['split']
    'train'
  """
  return streams.printable(_parse_metrics(os.path.join(folder, _METRICS))[0])


def _parse_metrics(path):
  """The lines, and the offsets where the first n of them end, [lines + 1]."""
  try:
    with open(path, 'rb') as file:
      content = file.read().splitlines(keepends=True)
  except FileNotFoundError:
    return [], [0]
  except OSError as error:
    raise disk_error(f'{path} cannot be read', error.strerror) from error
  if content and not content[-1].endswith(b'\n'):
    content.pop()
  lines, ends, keys = [], [0], set()
  for number, text in enumerate(content, 1):
    problem, line = _parse_line(text)
    if not problem and lines and line['step'] < lines[-1]['step']:
      problem = f'its step {line["step"]} is before that of the line above'
    key = None if problem else (line['step'], line['split'], line.get('unit'))
    if key in keys:
      problem = f'there is one of this split and step {line["step"]} above'
    if problem:
      raise ValueError(
          f'line {number} of {path} is none that a run writes: {problem}; '
          'remove it and all lines after it, and the run goes on from a '
          'checkpoint before them, or choose another `workdir`.')
    keys.add(key)
    lines.append(line)
    ends.append(ends[-1] + len(text))
  return lines, ends


def _parse_line(text):
  """What is wrong with a line of the metrics, or ''; and the line."""
  try:
    line = json.loads(text, parse_constant=_no_constant)
  except (ValueError, RecursionError):
    return 'it is not JSON', None
  if not isinstance(line, dict):
    return f'it must be an object, got {text[:20].decode(errors="replace")!r}', {}
  for field in ('step', 'epoch'):
    if type(line.get(field)) is not int or line[field] < 0:
      return f'`{field}` must be a whole number, got {line.get(field)!r}', {}
  numbers = {k: v for k, v in line.items() if k not in ('split', 'unit')}
  for field, value in numbers.items():
    if value is not None and type(value) not in (int, float):
      return f'`{field}` must be a number, got {value!r}', {}
  if not isinstance(line.get('split'), str) or not isinstance(
      line.get('unit', ''), str):
    return '`split` and `unit` must be texts', {}
  return '', line


def _no_constant(name):
  raise ValueError(f'{name} is not JSON')


def _open(path, flags):
  """A descriptor to write a regular file, made if it is missing.

  Symbolic links are not followed, pipes not waited for.
  """
  flags |= os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
  descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise OSError(errno.EINVAL, 'Not a regular file', path)
  return descriptor


def _write_all(descriptor, text):
  data = memoryview(text.encode())
  while data:
    data = data[os.write(descriptor, data):]


def _reason(error):
  if error.errno == errno.ELOOP:
    return 'it holds a symbolic link in place of log.txt'
  return error.strerror


def _digest(folder, summary):
  """A hash of a summary, and of the metrics and the config that it is about.

  Without the times: summaries of equal runs have equal ones.
  """
  summary = {k: v for k, v in summary.items() if k not in _TIMES}
  digest = hashlib.blake2b(_hash(summary).encode(), digest_size=16)
  digest.update(identity(folder).encode())
  with disk(f'{_METRICS} cannot be read'), open(
      os.path.join(folder, _METRICS), 'rb') as file:
    digest.update(file.read())
  return digest.hexdigest()


def identity(folder: str) -> str:
  """A hash of all fields that are not at their default, as newer ones are.

  Without the epochs where a run goes on when they are raised.
  """
  held = _read_json(os.path.join(folder, _CONFIG)) or {}
  if held.get('schedule') not in config_lib.OF_THE_TOTAL:
    held.pop('epochs', None)
  default = config_lib.to_json(config_lib.default())
  return _hash({
      k: v for k, v in held.items() if k not in default or default[k] != v})


def _hash(value):
  text = json.dumps(value, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _pretty(value):
  return json.dumps(value, indent=2) + '\n'


def _read_json(path):
  """An object that a JSON file holds; None where there is no such thing."""
  try:
    with open(path, encoding='utf-8') as file:
      value = json.load(file)
  except (ValueError, RecursionError, FileNotFoundError, NotADirectoryError,
          IsADirectoryError):
    return None
  except OSError as error:
    raise disk_error(f'{path} cannot be read', error.strerror) from error
  return value if isinstance(value, dict) else None


def _without_nan(value):
  """JSON has no NaN: what is not defined is null."""
  if isinstance(value, Mapping):
    return {name: _without_nan(v) for name, v in value.items()}
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
