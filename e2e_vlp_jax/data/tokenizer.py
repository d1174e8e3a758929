"""Text <-> token ids: WordPiece, byte-level BPE and SentencePiece.

`load_tokenizer(kind, path)` loads any of the three. Special tokens are never
parsed from text: '[MASK]' in a caption is punctuation and a word. `to_dict()`
contains everything that a tokenizer needs, so a checkpoint works without the
vocabulary file.
"""
import base64
import json
import os

import sentencepiece
import tokenizers

from e2e_vlp_jax.errors import UserError, nearest

_SHIPPED = os.path.join(os.path.dirname(__file__), 'vocab')


def load_tokenizer(kind, path):
  """Reads a vocabulary.

  Args:
    kind: 'wordpiece' (BERT uncased; one token a line), 'bpe' (RoBERTa;
      vocab.json with merges.txt beside it, or the folder of both) or
      'sentencepiece' (a .model file).
    path: a file, or the name of a shipped vocabulary ('bert-base-uncased'
      and 'scenes' for 'wordpiece', 'roberta-base' for 'bpe').

  Returns:
    A `Tokenizer`.

  Raises:
    UserError: an unknown kind, no such file, not a vocabulary, or one that
      lacks a special token.
  """
  if kind not in _KINDS:
    raise UserError(f'tokenizer.kind: unknown {kind!r}'
                    + nearest(kind, _KINDS))
  return _KINDS[kind].load(path)


def from_dict(d):
  """The tokenizer whose `to_dict()` gave `d`."""
  return _KINDS[d['kind']](d)


class Tokenizer:
  """Base class of the three kinds; see `load_tokenizer`.

  Attributes:
    vocab_size: number of ids.
    tokens: list of all tokens, by id.
    pad_id, cls_id, sep_id, mask_id: ids of the special tokens.
    special_ids: sorted ids that are not part of a text (these and unknown).
  """
  kind = None
  specials = None  # (pad, cls, sep, mask, unknown), as in the vocabulary

  def __init__(self, data, tokens):
    self._data = data
    self.tokens = tokens
    self.vocab_size = len(tokens)
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for names in self.specials:
      names = (names,) if isinstance(names, str) else names
      found.append(next((ids[n] for n in names if n in ids), None))
      if found[-1] is None:
        raise UserError(
            f'tokenizer: the {self.kind} vocabulary of {len(tokens)} tokens '
            f'lacks the special token {" or ".join(names)}')
    self.pad_id, self.cls_id, self.sep_id, self.mask_id, _ = found
    self.special_ids = tuple(sorted(found))

  def encode(self, text, max_length=None):
    """[CLS] text [SEP]; at most `max_length` ids, [SEP] always kept."""
    ids = [self.cls_id, *self._encode(text), self.sep_id]
    if max_length and len(ids) > max_length:
      ids = ids[:max_length - 1] + [self.sep_id]
    return ids

  def token_spans(self, text, max_length=None):
    """The characters of each token that `encode` makes of a text.

    Returns:
      [(first character, character after the last)], without the space before a
      word; (-1, -1) for the special tokens at both ends.
    """
    found = []
    for first, end in self._token_spans(text):
      while first < end and text[first].isspace():
        first += 1
      found.append((first, end))
    if max_length:
      found = found[:max_length - 2]
    return [(-1, -1), *found, (-1, -1)]

  def decode(self, ids):
    """Text of `ids` without special tokens, with normal spacing."""
    skip = set(self.special_ids)
    return ' '.join(self._decode([int(i) for i in ids
                                  if int(i) not in skip]).split())

  def to_dict(self):
    """A JSON-able dict, enough to rebuild the tokenizer (`from_dict`)."""
    return {'kind': self.kind, **self._data}


class _WordPiece(Tokenizer):
  """BERT uncased: cleaned, lower-cased, accents stripped, word pieces."""
  kind = 'wordpiece'
  specials = ('[PAD]', '[CLS]', '[SEP]', '[MASK]', '[UNK]')

  @classmethod
  def load(cls, path):
    names = [f[:-4] for f in sorted(os.listdir(_SHIPPED))
             if f.endswith('.txt')]
    if path in names:
      path = os.path.join(_SHIPPED, path + '.txt')
    # Not splitlines: BERT's vocabulary has tokens that Unicode counts as line
    # ends.
    tokens = _read(path, 'a vocabulary of one token a line',
                   shipped=names).split('\n')
    tokens = [t.removesuffix('\r') for t in tokens]
    return cls({'tokens': tokens[:-1] if tokens[-1] == '' else tokens})

  def __init__(self, data):
    super().__init__({'tokens': data['tokens']}, data['tokens'])
    self._t = tokenizers.Tokenizer(tokenizers.models.WordPiece(
        {t: i for i, t in enumerate(self.tokens)}, unk_token='[UNK]'))
    # Lower-casing implies NFD and dropping combining marks, as in BERT.
    self._t.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    self._t.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    self._t.decoder = tokenizers.decoders.WordPiece(cleanup=True)

  def _encode(self, text):
    return self._t.encode(text).ids

  def _token_spans(self, text):
    return self._t.encode(text).offsets

  def _decode(self, ids):
    return self._t.decode(ids)


class _Bpe(Tokenizer):
  """RoBERTa (GPT-2): bytes, case and accents kept, no leading space."""
  kind = 'bpe'
  specials = ('<pad>', '<s>', '</s>', '<mask>', '<unk>')

  @classmethod
  def load(cls, path):
    if not os.path.exists(path) and path == os.path.basename(path):
      shipped = os.path.join(_SHIPPED, path)
      path = shipped if os.path.isdir(shipped) else path
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    file = os.path.join(path, 'vocab.json') if os.path.isdir(path) else path
    try:
      vocab = json.loads(_read(file, 'vocab.json of a byte-level BPE'))
      tokens = sorted(vocab, key=vocab.get)
      if [vocab[t] for t in tokens] != list(range(len(tokens))):
        raise ValueError('ids are not 0, 1, 2, ...')
    except (ValueError, AttributeError, TypeError) as e:
      raise UserError(f'tokenizer.path: {file} is not a vocab.json of '
                      f'{{token: id}} ({e})') from e
    merges = _read(os.path.join(folder, 'merges.txt'),
                   'merges.txt beside vocab.json').split('\n')
    merges = [m for m in merges if m and not m.startswith('#version')]
    return cls({'tokens': tokens, 'merges': merges})

  def __init__(self, data):
    data = {'tokens': data['tokens'], 'merges': data['merges']}
    super().__init__(data, data['tokens'])
    try:
      model = tokenizers.models.BPE(
          {t: i for i, t in enumerate(self.tokens)},
          [tuple(m.split(' ')) for m in data['merges']])
    except Exception as e:  # the Rust side raises bare Exceptions
      raise UserError(f'tokenizer.path: merges.txt does not fit vocab.json '
                      f'({e})') from e
    self._t = tokenizers.Tokenizer(model)
    self._t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False)
    self._t.decoder = tokenizers.decoders.ByteLevel()

  def _encode(self, text):
    return self._t.encode(text).ids

  def _token_spans(self, text):
    return self._t.encode(text).offsets

  def _decode(self, ids):
    return self._t.decode(ids)


class _SentencePiece(Tokenizer):
  """A SentencePiece model that was trained with our special tokens."""
  kind = 'sentencepiece'
  specials = (('[PAD]', '<pad>'), ('[CLS]', '<s>'), ('[SEP]', '</s>'),
              ('[MASK]', '<mask>'), ('[UNK]', '<unk>'))

  @classmethod
  def load(cls, path):
    if not os.path.isfile(path):
      raise UserError(f'tokenizer.path: no file {path!r}; expected a '
                      'SentencePiece .model')
    with open(path, 'rb') as f:
      return cls({'model': base64.b64encode(f.read()).decode()})

  def __init__(self, data):
    try:
      self._t = sentencepiece.SentencePieceProcessor(
          model_proto=base64.b64decode(data['model']))
    except RuntimeError as e:
      raise UserError('tokenizer.path: not a SentencePiece .model') from e
    super().__init__({'model': data['model']}, [
        self._t.id_to_piece(i) for i in range(self._t.get_piece_size())])
    self._not_text = {self.pad_id, self.cls_id, self.sep_id, self.mask_id}

  def _encode(self, text):
    # A SentencePiece model may parse special tokens from text; drop them.
    return [i for i in self._t.encode(text) if i not in self._not_text]

  def _token_spans(self, text):
    return [(p.begin, p.end)
            for p in self._t.encode(text, out_type='immutable_proto').pieces
            if p.id not in self._not_text]

  def _decode(self, ids):
    return self._t.decode(ids)


_KINDS = {k.kind: k for k in (_WordPiece, _Bpe, _SentencePiece)}


def _read(path, expected, shipped=()):
  """The text of a UTF-8 file, unchanged."""
  if not os.path.isfile(path):
    raise UserError(f'tokenizer.path: no file {path!r}; expected {expected}'
                    + (nearest(path, shipped) if shipped else ''))
  try:
    with open(path, encoding='utf-8', newline='') as f:
      return f.read()
  except UnicodeDecodeError as e:
    raise UserError(f'tokenizer.path: {path} is not UTF-8 text; expected '
                    f'{expected}') from e
