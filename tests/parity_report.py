"""Writes docs/parity.md: every comparison with somebody else's numbers.

  python -m tests.parity_report

Runs the tests that compare (minutes) and collects what they noted, which is
`record_property('parity', (component, against, worst difference, tolerance))`.
Where a component was compared with stored results and live, the live row is
kept. Refuses to write unless every test passed; what was skipped (without
torch, say) is listed on the page.
"""
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
FILES = ('test_parity_detr', 'test_parity_resnet', 'test_parity_bert',
         'test_matching', 'test_detection_metrics', 'test_caption_metrics',
         'test_tokenizer', 'test_parity_data', 'test_parity_optim',
         'test_convert_fiber',
         'test_parity_soho', 'test_parity_fiber_coarse')
HEADER = '''# How close to the official tools

Written by `python -m tests.parity_report`; every row is asserted by a test.
"Difference" is the largest absolute one over all values compared, on random
weights and padded batches where the row does not say otherwise.

| component | compared with | difference | tolerance |
|---|---|---|---|
'''
NOTES = '''
## Notes

- **Auxiliary losses.** With `auxiliary_loss=True`, transformers 5.23 hands the
  *normalised* state of a decoder layer on to the next layer and normalises
  the last state twice; its logits then differ by more than 1 from its own
  logits without that option. In the original DETR, with which the published
  weights were trained, the norm is for the heads alone, and so it is here.
  The rows with auxiliary losses therefore take the layers' states from
  transformers' forward pass without the option, and put them through its own
  norm, heads and loss.
- **Padding.** In DETR, what lies beyond an image's edge reaches its features
  through the trunk's convolutions, so that results depend on the batch.
  `model.backbone.mask_padding=False` does the same, and the rows above
  compare it. The default keeps padding out: padded cells are zeroed before
  every convolution that would see them, so an image has the outputs that it
  has alone ("padded batch with mask_padding"), whatever else is in the batch
  and whatever canvas it lies on. Exact where buckets are multiples of the
  trunk's stride, as those of the configs are. (What a bucket also decides is
  the scale to which an image is resized.) On the quickstart's model and all
  its test images, the detection metrics in evaluation batches of 64, 7 and 50
  and in buckets of 96x96, 96x144 and 168x96 differed by at most 6.5e-7 (AP
  0.7133); `tests/test_evaluators.py` holds a small model to it.
- **Gradients.** Those of the keys' biases, and of the first decoder layer's
  self-attention queries and keys, are zero by symmetry; there both sides must
  be below 1e-6 of the largest gradient. The tolerance of 1e-3 of each
  tensor's maximum holds for the configurations and seeds of the rows, not in
  general: a unit within rounding of a ReLU's edge may fall on its other side,
  which changes single gradients by more. Of five fresh configurations of DETR
  that an independent check tried, two kept to the tolerance and three did
  not; against float64, torch's own float32 gradients erred by as much there.
  Outputs and losses, which are continuous at the edge, kept to their
  tolerance in all five. The seeds of the rows were chosen without such units;
  another machine may still round some to the other side.
- **Frozen parts** (stem, layer1, BatchNorms) have no gradient on either side.
- **SOHO.** Rows `soho_<file>` are compared with arrays that the released code
  made (reference/soho; what each holds is in its README), every array of each
  file but: gradients and updates of the keys' biases (rounding, their true
  value is zero), those of the tied output layer under its second name,
  torch's batch counters, and seeds and margins, which are no results. The
  head of `soho_vqa` is one of `model.heads`. The pack holds nothing of half
  precision, dropout, or torch's random draws: those recorded are fed in.
- **FIBER.** Rows "FIBER coarse" are compared with arrays that the original
  code made (reference/fiber_coarse); docs/fiber.md has a table by files, and
  what is not compared. Gradients of the text layers' key biases are zero but
  for rounding on both sides.
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
        old = self.rows.get(row[0])
        if old is None or old[1].startswith('stored'):
          self.rows[row[0]] = tuple(row)


def main():
  found = Collector()
  code = pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist',
                      *(str(HERE / f'{name}.py') for name in FILES)],
                     plugins=[found])
  if code:
    sys.exit('a test failed; docs/parity.md is as it was')
  number = lambda x: f'{x:.1e}' if x else '0'
  text = HEADER + ''.join(
      f'| {component} | {against} | {number(worst)} | {number(tolerance)} |\n'
      for component, against, worst, tolerance in found.rows.values()) + NOTES
  if found.skipped:
    text += '\n## Skipped where this page was written\n\n' + ''.join(
        f'- `{test}`: {reason}\n' for test, reason in found.skipped.items())
  path = HERE.parent / 'docs' / 'parity.md'
  path.write_text(text)
  print(f'{path}: {len(found.rows)} rows')


if __name__ == '__main__':
  main()
