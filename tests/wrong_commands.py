"""Wrong commands, wrong library calls, and what has to be said of each.

`COMMANDS` and `CALLS` are data; this program tries them all, and every field of
a config with every kind of wrong value (`--long`: as whole commands, with every
argument of every rule and model). One process is kept warm and forked for each
command.

  python tests/wrong_commands.py --json=results/wrong_inputs.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import sys
import tempfile
import traceback

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))
_QUICKSTART = str(_ROOT / 'experiments/configs/quickstart.py')
# Of several processes: flags, words of the sentence.
_PROCESSES = [
    (['--coordinator=host', '--num_processes=2', '--process_id=0'], 'HOST:PORT'),
    (['--coordinator=h:1', '--num_processes=2', '--process_id=2'], 'from 0 to 1'),
    (['--coordinator=h:1', '--num_processes=3', '--process_id=0'], 'divisible'),
    (['--coordinator=h:1'], 'are missing'), (['--timeout=0'], '`timeout`'),
    (['--num_processes=x'], 'num_processes'),
    (['--distributed', '--process_id=0'], 'must be left out')]
_LIMIT = 2.  # Seconds of its process, whatever else the machine does.
_ACCEPTED = 99  # Exit code of a run that would have begun to train.

# Field -> pairs (value as text, words of the sentence). Values in a Python file
# may be of any type; see `VALUES`.
_FIELDS = {
    'sharding': [
        ("(('*',5),)", 'sharding[0][1]'), ('(1,)', 'sharding[0]'),
        ('(None,)', 'sharding[0]'), ("(('*',()),('*',()))", 'once'),
        ("(('*',('data',7)),)", 'sharding[0][1][1]'), ('x', 'sharding'),
        ("(('*/kernel',()),)", 'no pattern matches'),
        ("(('*',('modle',)),)", "axis 'modle'"),
        ("(('*','fspd'),)", 'did you mean `fsdp`'),
        ("(('*','tensor'),)", "needs an axis 'model'")],
    'frozen': [
        ('(1,)', 'frozen[0]'), ('(None,)', 'frozen[0]'), ("('*',)", 'learns'),
        ("('',)", 'frozen[0]'), ("('Dense_7',)", "'Dense_7'"),
        ("('Dense_0','Dense_0')", 'once'), ("('.*',)", 'something that learns'),
        ("(('Dense_0',),)", 'frozen[0]')],
    'boundaries': [('(1,)', 'boundaries[0]'), ('(None,)', 'boundaries[0]'),
                   ("('a','a')", 'once'), ("('',)", 'boundaries[0]')],
    'units': [('(1,)', 'units[0]'), ('(None,)', 'units[0]'),
              ("('nothing',)", 'fits no module'), ("('a','a')", 'once')],
    'rule_by_path': [
        ("(('a','backprop'),)", 'rule_by_path[0]'), ('(1,)', 'rule_by_path[0]'),
        ('(None,)', 'rule_by_path[0]'), ("((1,'backprop',{}),)", '[0][0]'),
        ("(('Dense_0',1,{}),)", '[0][1]'), ("(('Dense_0','backprop',1),)", '[0][2]'),
        ("(('Dense_0','backporp',{}),)", 'did you mean `backprop`'),
        ("(('Dense_9','backprop',{}),)", 'matches no unit'),
        ("(('Dense_0','backprop',{}),('Dense_0','backprop',{}))", 'once'),
        ("(('Dense_0','feedback_alignment',{'scale':'a'}),)", 'scale')],
    'reduction_by_path': [
        ("(('Dense_0','max'),)", 'reduction_by_path[0][1]'),
        ("(('Dense_9','sum'),)", "'Dense_9'"), ('(1,)', 'reduction_by_path[0]'),
        ("(('a','sum'),('a','mean'))", 'once'), ('(None,)', 'reduction_by_path')],
    'bottleneck': [
        ("(('Dense_0',0),)", 'bottleneck[0][1]'), ("(('Dense_0',-1),)", 'bottleneck'),
        ("(('Dense_0',999),)", 'at most its 64'), ("(('Dense_9',3),)", 'matches no unit'),
        ("(('Dense_0',3),('Dense_0',4))", 'once'), ("(('Dense_0',1.5),)", 'whole'),
        ("(('Dense_0',True),)", 'whole'), ("(('Dense_0','x'),)", 'whole'),
        ('(1,)', 'bottleneck[0]'), ('(None,)', 'bottleneck[0]')],
    'optimizer_by_path': [
        ("(('a','adm',.1),)", 'did you mean `adam`'), ("(('a','adam',-1),)", '[0][2]'),
        ("(('a','adam',1e-300),)", '[0][2]'), ("(('Dense_9','adam',.1),)", "'Dense_9'"),
        ("(('a','adam'),)", 'triple'), ('(1,)', 'optimizer_by_path[0]'),
        ("(('a','sgd',.1),('a','sgd',.2))", 'once')],
    'pixel_mean': [('(None,)', 'pixel_mean[0]'), ("('a',)", 'pixel_mean[0]'),
                   ('(.5,.5)', 'one for each of the 1'), ('(1e999,)', 'pixel_mean[0]')],
    'pixel_std': [('(0.,)', 'pixel_std[0]'), ('(-1,)', 'pixel_std[0]'),
                  ('(None,)', 'pixel_std[0]'), ('((1,),)', 'pixel_std[0]')],
    'learning_rate': [('0', 'learning_rate'), ('-1', 'learning_rate'),
                      ('nan', 'learning_rate'), ('inf', 'learning_rate'),
                      ('1e-300', 'learning_rate'), ('abc', 'learning_rate'),
                      ('', 'learning_rate')],
    'clip_norm': [('1e-30', 'clip_norm'), ('-1', 'clip_norm'), ('nan', 'clip_norm')],
    'epochs': [('0', 'epochs'), ('1.5', 'epochs'), ('abc', 'epochs'),
               ('99999999999999999999', 'epochs'), ('2000000000', 'epochs')],
    'batch_size': [('0', 'batch_size'), ('-5', 'batch_size'),
                   ('2000', 'at most the 1437'), ('1e3', 'batch_size')],
    'seed': [('-1', 'seed'), ('2147483648', 'seed'), ('a', 'seed')],
    'feedback_schedule': [('epochs', 'feedback_schedule'), ('epoch', 'did you mean')],
    'rule': [('backporp', 'did you mean `backprop`'), ('', 'rule'),
             ('学', 'rule'), ('LG-FGA', 'did you mean `LG-FG-A`')],
    'model': [('mpl', 'did you mean `mlp`'), ('', 'model'), ('/etc', 'model'),
              ('nowhere:Net', 'cannot be imported'),
              ('nowhere.py:Net', 'not there'), ('math:pi', 'a class')],
    'dataset': [('digit', 'digits'), ('', 'dataset'), ('./none', 'nothing lies'),
                ('none.csv', 'nothing lies'), ('math:pi', 'a function or a class'),
                ('nowhere:data', 'cannot be imported')],
    'image_size': [('8', 'means nothing'), ('-1', 'image_size')],
    'metrics': [("('top5',)", 'metrics[0]'), ("('nowhere:m',)", 'metrics[0]')],
    'ema': [('1', 'ema'), ('-.1', 'ema'), ('nan', 'ema')],
    'label_smoothing': [('1', 'label_smoothing'), ('-.1', 'label_smoothing')],
    'prior_bias': [('2', 'prior_bias')],
    'class_weights': [("(1.,)", 'each of the 10'), ('(-1.,)', 'class_weights[0]')],
    'early_stopping': [('2', 'needs validation'), ('-1', 'early_stopping')],
    'keep_best': [('True', 'needs validation'), ('2', 'keep_best')],
    'dataset_args.keys': [('3', 'a method of that name')],
    'optimizer': [('adm', 'did you mean `adam`'), ('', 'optimizer')],
    'loss': [('mse', 'loss'), ('crossentropy', 'did you mean')],
    'reduction': [('max', 'reduction')], 'schedule': [('cos', 'schedule')],
    'preprocessing': [('zca', 'did you mean')], 'augment': [('crop', 'augment')],
    'alignment_split': [('tset', 'did you mean'), ('validation', 'no whole batch')],
    'momentum': [('1', 'momentum'), ('-.1', 'momentum'), ('nan', 'momentum')],
    'weight_decay': [('1', 'weight_decay'), ('-1', 'weight_decay')],
    'l2': [('-1', 'l2'), ('inf', 'l2')],
    'warmup_epochs': [('-1', 'warmup_epochs'), ('99', 'warmup_epochs')],
    'final_learning_rate': [('.1', 'final_learning_rate')],
    'schedule_power': [('0', 'schedule_power')],
    'zca_epsilon': [('0', 'zca_epsilon')], 'input_noise': [('-1', 'input_noise')],
    'contrastive_temperature': [('0', 'contrastive_temperature')],
    'contrastive_dim': [('0', 'contrastive_dim')],
    'validation': [('-1', 'validation'), ('2000', 'validation')],
    'train_examples': [('-1', 'train_examples')],
    'eval_batch_size': [('0', 'eval_batch_size'), ('9999999', 'eval_batch_size')],
    'keep_checkpoints': [('0', 'keep_checkpoints')],
    'log_every': [('-1', 'log_every')], 'checkpoint_every': [('-1', 'checkpoint_every')],
    'alignment_every': [('-1', 'alignment_every')],
    'steps_per_call': [('-1', 'steps_per_call')],
    'mirror_every': [('0', 'mirror_every'), ('2', 'needs' ' a rule|need a rule')],
    'mirror_first': [('-1', 'mirror_first')], 'particles': [('x', 'particles'), ('True', 'settles')],
    'feedback_learning_rate': [('1', 'feedback_optimizer'), ('-1', 'feedback_learning_rate')],
    'feedback_optimizer': [('adm', 'did you mean')],
    'mesh.学': [('1', 'mesh')], 'mesh.model': [('3', 'mesh'), ('0', 'mesh.model'), ('x', 'mesh.model')],
    'mesh.data': [('-2', 'mesh.data')],
    'model_args.dtype': [('float7', 'dtype'), ('1', 'dtype')],
    'model_args.widths': [('(1e300,)', 'must be whole'), ('(0,)', 'widths'), ('(None,)', 'widths'), ("('a',)", 'widths'), ('()x', 'widths')],
    'model_args.activation': [('relo', 'relu'), ('1', 'activation')],
    'model_args.width': [('3', 'did you mean `widths`')],
    'model_args.dropout': [('1', 'dropout'), ('nan', 'dropout'), ('a', 'dropout')],
    'model_args.num_classes': [('1e+300', 'must be whole'), ('5', 'below the 5 outputs'), ('-1', 'num_classes')],
    'rule.scale': [('1', 'fields of their own')], 'rule_args.a.b': [('1', 'one level deep')],
    'lerning_rate': [('1', 'did you mean `learning_rate`')],
}
# Arguments of a rule, likewise.
_RULES = {
    'feedback_alignment': {'scale': ['(1,)', 'nan', 'inf', '-1', '0', 'a', 'None', 'True'],
                           'scal': ['1']},
    'direct_feedback_alignment': {'connections': ['-1', '1.5', '999'], 'placement': ['x', '1'],
                                  'shared': ['1']},
    'forward_gradient': {'samples': ['0', '1.5', '(1,)'], 'directions': ['x'], 'noise': ['x'],
                         'epsilon': ['-1', 'nan'], 'perturb': ['x']},
    'weight_mirror': {'decay': ['1', 'nan'], 'rate': ['0'], 'activation': ['relo']},
    'equilibrium_propagation': {'beta': ['0'], 'free_steps': ['0']},
    'recursive_local_representation_alignment': {'wiring': ['x'], 'gap': ['0']},
    'sign_symmetry': {'variant': ['uSf'], 'zero_sign': ['2']},
    'target_propagation': {'step': ['-1'], 'inverse': ['x'], 'top': ['x']},
}
_FILES = {
    'syntax': ('def get_config(:\n', 'line 1'),
    'dict': ('def get_config():\n  return {}\n', 'config'),
    'none': ('def get_config():\n  return None\n', 'config'),
    'raises': ('def get_config():\n  raise RuntimeError("a\\nb")\n', 'line 2'),
    'exits': ('import sys\nsys.exit(3)\n', 'line 2'),
    'lacks': ('x = 1\n', 'get_config'),
    'imports': ('import nothing_of_this_name\n', 'nothing_of_this_name'),
    'unknown': ('from bpjax.train import config\ndef get_config():\n'
                '  c = config.default()\n  c.lerning_rate = 1\n  return c\n', 'lerning_rate'),
    'type': ('from bpjax.train import config\ndef get_config():\n'
             '  c = config.default()\n  c.epochs = "many"\n  return c\n', 'epochs'),
    'empty': ('import ml_collections\ndef get_config():\n'
              '  return ml_collections.ConfigDict()\n', 'missing'),
    'object': ('from bpjax.train import config\ndef get_config():\n'
               '  c = config.default()\n  c.rule_args.scale = object()\n  return c\n', 'rule_args.scale'),
}
_SWEEPS = [
    (['--grid=rule=backprop,backporp'], 'did you mean `backprop`'),
    (['--grid=lerning_rate=1,2'], 'did you mean `learning_rate`'),
    (['--grid=epochs=1,1'], 'twice'), (['--grid=epochs='], 'grid'),
    (['--grid=epochs=1,,2'], 'grid'), (['--grid==1'], 'grid'), (['--grid=epochs'], 'grid'),
    (['--grid=epochs=1', '--grid=epochs=2'], 'once'), (['--grid=seed=1'], 'seed'),
    (['--grid=epochs=1,0'], 'epochs'), (['--seeds=a'], 'seed'), (['--seeds=-1'], 'seed'),
    (['--grid=learning_rate=1e-3,nan'], 'learning_rate'),
    (['--grid=rule_args.scal=1'], 'rule_args.scal'),
    (["--grid=frozen=('Dense_0',),('Dense_8',)"], 'Dense_8'),
    (['--jobs=0'], 'jobs'), (['--jobs=-1'], 'jobs'), (['--jobs=x'], 'jobs'),
    (['--jobs=99999'], 'at most|to 1024'), (['--watch=tensorbord'], 'did you mean'),
    (['--random=3'], 'to draw from'), (['--random=-1', '--grid=epochs=1,2'], 'random'),
    (['--random=x'], 'random'), (['--random=3', '--grid=epochs=1,2'], 'the 2 points'),
    (['--random=9', '--grid=epochs=int:1:4'], 'the 4 points'),
    (['--seed=1', '--grid=epochs=1,2'], '--seeds'),
    (['--random=1', '--seed=-1', '--grid=epochs=1,2'], '`seed`'),
    (['--grid=learning_rate=log:1e-4:1e-1'], '--random'),
    (['--random=2', '--grid=learning_rate=log:0:1'], 'above 0'),
    (['--random=2', '--grid=learning_rate=log:1:1e-3'], 'the lower end first'),
    (['--random=2', '--grid=learning_rate=log:1e-3'], 'uniform:0:.5'),
    (['--random=2', '--grid=learning_rate=uniform:nan:1'], 'a range such as'),
    (['--random=2', '--grid=epochs=int:1.5:3'], 'int:1:8'),
    (['--random=2', '--grid=epochs=int:1:3,7'], 'one range'),
    (['--random=2', '--grid=epochs=uniform:1:3'], 'epochs'),
    (['--random=2', '--grid=lerning_rate=log:1e-4:1e-1'], 'did you mean `learning_rate`'),
    (['--random=2', '--grid=rule_args.scal=uniform:1:2'], 'rule_args.scal'),
]


def commands(folder: str) -> list[tuple[str, list[str], int, str]]:
  """(program, arguments, exit code, words) of every wrong command."""
  base = [f'--config={_QUICKSTART}', f'--workdir={folder}/run']
  found = [
      ('main', [*base, f'--config.{field}={text}'], 2, words)
      for field, cases in _FIELDS.items() for text, words in cases]
  found += [
      ('main', [*base, f'--config.rule={rule}', f'--config.rule_args.{name}={text}'], 2, name)
      for rule, names in _RULES.items() for name, texts in names.items() for text in texts]
  for name, (text, words) in _FILES.items():
    file = pathlib.Path(folder, f'{name}.py')
    file.write_text(text)
    found.append(('main', [f'--config={file}', base[1]], 2, words))
  found += [('sweep', [*base, *arguments], 2, words) for arguments, words in _SWEEPS]
  return [*found, *(('main', a, 2, w) for a, w in (
      ([base[1]], 'config'), (['--config=none.py', base[1]], 'there is none at'),
      (['--config=', base[1]], 'config'), ([*base, '--wrokdir=x'], 'wrokdir'),
      ([*base, '--watch=tensorbord'], 'did you mean `tensorboard`'),
      ([*base, '--watch=wandb,wandb'], 'once'),
      ([*base, 'x'], 'unexpected argument'), ([base[0]], 'workdir'),
      *(([*base, *flags], words) for flags, words in _PROCESSES)))]


def run(program: str, arguments: list[str]) -> tuple[int, str, float]:
  """Exit code, what was printed, and seconds of a command in a fork.

  A run that is accepted ends where it would be compiled.
  """
  with tempfile.TemporaryFile('w+') as out:
    child = os.fork()
    if not child:
      code = 1
      try:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        code = _called(program, arguments)
      except BaseException:  # Its traceback is what is looked for.
        traceback.print_exc()
      finally:
        with contextlib.suppress(Exception):
          sys.stdout.flush()
          sys.stderr.flush()
        os._exit(code)
    _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    out.seek(0)
    return os.waitstatus_to_exitcode(status), out.read(), seconds


def _called(program, arguments):
  from bpjax.train.loop import run as run_lib
  from experiments import main
  from experiments import sweep

  def accept(*_):
    os._exit(_ACCEPTED)

  run_lib._compile = accept  # pylint: disable=protected-access
  argv = sys.argv = [program, *arguments]  # Flags of a config read it there.
  try:
    {'main': main, 'sweep': sweep}[program].main(main.parse(argv))
  except SystemExit as end:
    return end.code or 0
  return 0


def fault(code: int, wanted: int | None, text: str, words: str, seconds: float) -> str:
  """What is wrong with an answer, or ''."""
  if 'Traceback' in text:
    return f'a traceback: {text[-300:]!r}'
  if wanted is None:
    return '' if code in (2, _ACCEPTED) else f'exit code {code}: {text[-300:]!r}'
  if code != wanted:
    return f'exit code {code}: {text[-300:]!r}'
  if text.count('error: ') != 1 or not any(w in text for w in words.split('|')):
    return f'not one sentence with {words!r}: {text[-300:]!r}'
  return f'{seconds:.1f} s' if seconds > _LIMIT else ''


# What any field may be given by mistake, as text and as a value.
VALUES = (
    None, True, -1, 0, 1.5, 10**30, float('nan'), float('inf'), 1e300, '', 'x',
    '学', 'a\nb\x1b[31m', 'x' * 5000, (), (1,), (None,), ((),), (('*', 5),),
    (('*', None, 1),), {}, {'a': 1}, {'学': 1}, {1: (None,)}, object(), b'x')


def fields() -> tuple[int, list[str]]:
  """Every field with every value: the number, and where not a ValueError."""
  from bpjax.train import fields as fields_lib
  default = {f.name: f.default for f in fields_lib.FIELDS}
  faults, count = [], 0
  for name in default:
    for value in VALUES:
      count += 1
      try:
        fields_lib.check({**default, name: value})
      except ValueError as error:
        if name not in str(error) or not str(error).isprintable():
          faults.append(f'{name}={value!r:.50}: {error}')
      except Exception as error:  # pylint: disable=broad-except
        faults.append(f'{name}={value!r:.50}: {error!r}')
  return count, faults


def generated() -> list[list[str]]:
  """Every field and argument with every value, as commands."""
  import inspect

  import bpjax
  from bpjax.train import fields as fields_lib
  texts = [v if isinstance(v, str) else repr(v) for v in VALUES[:-2]]
  found = [[f'--config.{name}={t}'] for name in fields_lib.BY_NAME for t in texts]
  for field, library in (('rule', bpjax.rules), ('model', bpjax.models)):
    for name in library.names():
      for argument in inspect.signature(library.get(name)).parameters:
        found += [[f'--config.{field}={name}', f'--config.{field}_args={{}}',
                   f'--config.{field}_args.{argument}={t}'] for t in texts]
  return found


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('--long', action='store_true')
  parser.add_argument('--no-calls', action='store_true')
  parser.add_argument('--json')
  options = parser.parse_args()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['TFDS_DATA_DIR'] = '/nonexistent'
  os.chdir(_ROOT)
  import bpjax.train.data
  from bpjax.train.loop import launch
  from experiments import sweep
  del launch, sweep
  faults = []
  with tempfile.TemporaryDirectory() as folder:
    bpjax.train.data.load('digits')  # Warm.
    listed = commands(folder)
    for program, arguments, wanted, words in listed:
      code, text, seconds = run(program, arguments)
      found = fault(code, wanted, text, words, seconds)
      if found:
        faults.append(f'{program} {" ".join(arguments[1:])}: {found}')
    if os.path.exists(f'{folder}/run/config.json'):
      faults.append('a refused command has claimed its folder')
    if options.long:
      for arguments in generated():
        code, text, seconds = run('main', [
            f'--config={_QUICKSTART}', f'--workdir={folder}/run', *arguments])
        found = fault(code, None, text, '', seconds)
        if found:
          faults.append(f'{arguments[-1]!r:.90}: {found}')
          print(faults[-1], file=sys.stderr, flush=True)
          print(faults[-1], file=sys.stderr, flush=True)
  count, wrong = fields()
  faults += wrong
  from wrong_calls import call
  from wrong_calls import CALLS
  for source, words in () if options.no_calls else CALLS:
    found = call(source, words)
    if found:
      faults.append(f'{source}: {found}')
  numbers = {
      'command': ' '.join(['python tests/wrong_commands.py', *sys.argv[1:]]),
      'commands': len(listed), 'calls': len(CALLS), 'field_values': count,
      'generated_commands': len(generated()) if options.long else None,
      'faults': len(faults)}
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(numbers, indent=1) + '\n')
  print(json.dumps({**numbers, 'faults': faults}, indent=1, ensure_ascii=False))
  return bool(faults)


if __name__ == '__main__':
  sys.exit(main())
