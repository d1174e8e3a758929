"""Visual question answering: the most likely answers of a list."""
import collections
import dataclasses

import jax
import jax.numpy as jnp

from e2e_vlp_jax.tasks import base

_AGREE = 3  # of ten people; VQA v2 counts such an answer as fully right


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer to a question; its score is the probability that it is right."""
  text: str
  score: float
  question: str


@dataclasses.dataclass(frozen=True)
class Result(base.Result):
  """`answers`: `Answer`s, the most likely first for each question."""
  answers: list


class Task(base.Task):
  """Classification among the answers of the model's answer list."""
  summary = 'answers to questions about the image'
  requests = {'joint': ('answer',)}
  keys = ('image', 'image_mask', 'text', 'text_mask')
  takes_text = needs_text = True
  options = {'answers': base.Option(5, 'answers to list for each question', 1,
                                    compiled=True)}
  finetuning = base.Finetuning(
      unit='question', objectives={'answer': 1.},
      head=dict(kind='classifier', state='pooled', views=('joint',),
                outputs='answers'),
      train_ops="text('questions')|answers",
      eval_ops="text('questions')", evaluator='vqa', metric='accuracy',
      data='vqav2', splits={'scenes': ('train', 'test'),
                            'vqav2': ('train', 'validation')},
      answers={'scenes': 'scenes', 'vqav2': 'vqav2'})

  def compute(self, predictor, variables, batch, answers=5):
    """{'scores' and 'ids' [B, P, N]} of the N most likely answers."""
    logits = predictor.model.apply(variables, batch, self.requests)[
        'joint']['answer_logits']
    # Independent probabilities, as `objectives.answer` trains them.
    scores = jax.nn.sigmoid(logits.astype(jnp.float32))
    scores, ids = jax.lax.top_k(scores, min(answers, logits.shape[-1]))
    return {'scores': scores, 'ids': ids}

  def result(self, predictor, arrays, size, texts):
    names = predictor.vocabularies.answers.answers
    return Result(self.name, *size, [
        Answer(names[i], float(score), question)
        for question, scores, ids in zip(texts, arrays['scores'],
                                         arrays['ids'])
        if question.strip() for score, i in zip(scores, ids)])

  def sample_texts(self, records):
    """One question per row; rows of one image ask its questions in turn."""
    texts, asked = [], collections.Counter()
    for record in records:
      questions = record['questions'] if record else ()
      if questions:
        k = asked[record['image_id']] % len(questions)
        asked[record['image_id']] += 1
      texts.append([questions[k]['question'] if questions else ''])
    return texts

  def draw(self, result, truth=None):
    """Question, best answer and, where they are known, people's answers.

    An answer is right if three people gave it, or the only one did.
    """
    if result is None:
      return base.Drawing()
    people = {q['question']: q['answers'] for q in truth.record['questions']
              } if truth is not None else {}
    best = {}  # question: its first answer, the most likely one
    for answer in result.answers:
      best.setdefault(answer.question, answer)
    rows = []
    for question, answer in best.items():
      row = [(answer.text or '(no words)', base.INK),
             (f'{answer.score:.2f}', base.FAINT)]
      theirs = people.get(question)
      if theirs:
        if theirs.count(answer.text) >= min(_AGREE, len(theirs)):
          row = [('✓', base.RIGHT), *row]
        else:
          common = max(theirs, key=theirs.count)
          row = [('✗', base.WRONG), *row,
                 (f'· people: {common}', base.FAINT)]
      rows += [[(question, base.FAINT)], row]
    return base.Drawing(sentences=rows)
