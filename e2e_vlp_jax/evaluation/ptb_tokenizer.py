"""The word splitting of coco-caption: Penn Treebank tokens, lower case.

coco-caption pipes captions through Stanford's Java PTBTokenizer (CoreNLP
3.4.1, `-preserveLines -lowerCase`) and drops a fixed list of punctuation.
BLEU, ROUGE-L and CIDEr are counted on what remains, so equal metric values
need equal tokens. This is an independent Python description of the same
lexicon, written from probing that tool: at each position the longest of the
rules below wins, the first one on ties, as in the original's lexer.
Measured agreement is in tests/test_caption_metrics.py.

Quotes, full stops, commas, colons, semicolons, single `?` and `!`, dashes and
ellipses are all dropped by coco-caption, so the original's many rules about
their direction and spelling need no counterpart here. Brackets stay, as
`-lrb-`: the original drops the upper-case spelling only, after lower-casing.
"""
import re

from e2e_vlp_jax.evaluation import ptb_characters

DROPPED = frozenset(["''", "'", '``', '`', '-LRB-', '-RRB-', '-LCB-', '-RCB-',
                     '.', '?', '!', ',', ':', '-', '--', '...', ';'])


def _characters(*tables):
  """All characters of tables of `ptb_characters`."""
  for part in ' '.join(tables).split():
    first, _, last = part.partition('-')
    yield from map(chr, range(int(first, 16), int(last or first, 16) + 1))


def _one_of(characters):
  """A regular expression of one of the characters; case counts."""
  ranges = []
  for c in sorted(map(ord, characters)):
    if ranges and ranges[-1][1] == c - 1:
      ranges[-1][1] = c
    else:
      ranges.append([c, c])
  return '(?-i:[' + ''.join(rf'\u{a:04x}-\u{b:04x}' for a, b in ranges) + '])'


_ALNUM = set(_characters(ptb_characters.LETTERS))
_IN_WORDS = _ALNUM | set(_characters(ptb_characters.MARKS))
_KNOWN = _IN_WORDS | set(_characters(ptb_characters.SYMBOLS))
_DIGIT = _one_of(c for c in _ALNUM if c.isdecimal())
_LETTER = _one_of(c for c in _IN_WORDS if not c.isdecimal())
_WORD = rf'{_LETTER}{_one_of(_IN_WORDS)}*'
# Ends of a word: no letter may follow.
_END = rf'(?!{_LETTER})'
_APOSTROPHE = "['\u2019\x92]"
_ANY_QUOTE = "['\u2019\x92`\u2018\x91\u201b]"

# Abbreviations that keep their full stop. In the second list only
# capitalised forms do: in lower case they are English words.
_ABBREVIATIONS = '''
adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd
bldg blvd brig bros calif capt cf cie cmdr co col colo comdr conn corp cos cpl
ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov
govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj
mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb
nev nov oct okla penn pfc ph plc pres prof profs pte pty ptys pvt rd rep reps
rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn
thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo'''.split()
_CAPITALISED = 'Ark Az Del Ill La Mass Miss Ore Pa Tex Wash'.split()
# These keep it only before a number: 'No. 5', but 'she said no.'
_BEFORE_NUMBER = 'art ca fig figs no nos op pp prop'.split()
# A single letter loses its full stop before a word that starts a sentence:
# 'Plan B. Then we ...'.
_STARTERS = '''
A About According Additionally After An As At But Earlier He Her Here However
If In It Last Many More Now Once One Other Our She Since So Some Such That The
Their Then There These They This We What When While Yet You'''.split()
_SPLIT = {'cannot': 'can not', 'gonna': 'gon na', 'gotta': 'got ta',
          'lemme': 'lem me', 'gimme': 'gim me', 'wanna': 'wan na'}


def _either(words):
  return '(?:' + '|'.join(sorted(words, key=len, reverse=True)) + ')'


_QUOTES = '[\x91-\x94\xab\xbb\u2018-\u201f\u2039\u203a]{1,2}'
_HYPHEN = '[-\u058a\u2010\u2011]'
_ACRONYM = r'[A-Za-z](?:\.[A-Za-z])*\.'
_SLASHED = r'[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}'
_URL_BREAK = r'''\s"<>|()'''
_URL_END = r'[^\s"<>|.!?(){},-]'
_URL_PATH = rf'(?:/[^{_URL_BREAK}]+{_URL_END})?'

# Rules in which case does not matter (R&B and US$ follow below).
_RULES = [
    # Words, and words glued by a missing space: 'river.a', 'hello!there'.
    rf'{_WORD}(?:[.!?]{_WORD})*',
    rf'{_one_of(_ALNUM)}+',
    r'[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*',
    # twenty-five, 3-d, up-to-date, semi-U.S.
    rf'[A-Za-z0-9][A-Za-z0-9.,]*'
    rf'(?:{_HYPHEN}(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9]+))+',
    # mirror/cabinet, and at most two slashes
    rf'{_SLASHED}(?:/{_SLASHED}){{1,2}}',
    rf'(?:(?:ph|ed)\.d|{_either(_ABBREVIATIONS)})\.',
    rf'{_either(_BEFORE_NUMBER)}\.(?=\s?\d)',
    _ACRONYM,
    # 'cars.,' keeps its full stop
    rf'({_WORD}\.)[,;:]',
    # can't -> ca n't; the group is the token, the rest decides the length
    rf'([a-z]*[a-mo-z])n{_ANY_QUOTE}t',
    rf'n{_ANY_QUOTE}t',
    rf'{_APOSTROPHE}(?:s|m|d|re|ve|ll){_END}',
    rf'{_either(_SPLIT)}{_END}',
    # o'clock, L'Oreal, D'Angelo; ma'am, ne'er
    rf'[dlno]{_ANY_QUOTE}{_LETTER}{_WORD}',
    rf'(?:{_LETTER}+[aeiouy]|e){_APOSTROPHE}[aeiou]{_LETTER}*',
    # rock 'n' roll, 'em, 'til, 'cause, the '90s, ol', c'mon, s'mores, y'all
    rf"{_APOSTROPHE}(?:n{_APOSTROPHE}|n{_END}|em{_END}|till?{_END}|cause{_END}"
    rf"|[2-9]0s{_END}|t(?=(?:is|was){_END}))",
    rf'(?:ol|[djl]|somethin|dunkin){_APOSTROPHE}{_END}|y{_APOSTROPHE}',
    rf'(?:c{_APOSTROPHE}mon|s{_APOSTROPHE}mores?|li{_APOSTROPHE}l'
    rf'|ev{_APOSTROPHE}ry|nor{_APOSTROPHE}easter){_END}',
    # -5, 1,000.50, 12:44, .5; 1/2, 3 1/2
    rf'[-+]?(?:{_DIGIT}*(?:[.:,\u066b\u066c]{_DIGIT}+)+|{_DIGIT}+)',
    rf'(?:{_DIGIT}{{1,4}}[- \xa0])?{_DIGIT}{{1,4}}[/\u2044]{_DIGIT}{{1,4}}',
    '[\xb2\xb3\xb9\u2070\u2074-\u2079]+|[\u2080-\u2089]+',
    # runs of these are one token, of quotes no more than two
    _QUOTES,
    r'[?!]+|\*+|_+|#{2,}|<<|>>|-{2,5}|-{6,}|\.{3,5}|(?:\.[ \xa0]){2,4}\.',
    # addresses, mentions, hash tags
    rf'https?://[^{_URL_BREAK}]+{_URL_END}',
    rf'www\.(?:[^\s"<>|.!?(){{}},]+\.)+[a-z]{{2,4}}{_URL_PATH}',
    rf'(?:[^\s"`\'<>|.!?(){{}}_$,-]+\.)+(?:com|net|org|edu){_URL_PATH}',
    r'[A-Za-z0-9][^\s"<>|(){}]*@(?:[^\s"<>|().]+\.)*[^\s"<>|().]+',
    r'[@#][a-z_]\w*',
    # <tag>, </tag>; :) ;-) =(
    r'</?[A-Za-z!?][^<>]*>',
    rf"[<>]?[:;=]['o*-]?[()DPp@|\[\]{{}}\\]{_END}",
    # '(555) 123-4567' is one telephone number
    r'\(\d{3}\)[ \xa0]?\d{3}[- ]\d{4}',
    r'&(?:amp|lt|gt|quot|apos);',
    r'\S',
]
_RULES = [re.compile(r, re.IGNORECASE) for r in _RULES] + [
    re.compile(r) for r in [
        r'[A-Z]+(?:[+&][A-Z]+)+', r'[A-Z]+\$',
        rf'[A-Z]{_APOSTROPHE}(?!(?:ll|ve|re){_END}){_LETTER}{_WORD}',
        rf'{_either(_CAPITALISED + [w.upper() for w in _CAPITALISED])}\.']]
_STARTER = re.compile(rf'\s{_either(_STARTERS)}\s')
_PLAIN = re.compile(r'[A-Za-z]+(?=[ \n]|, )')
_SPACE = re.compile(r'\s+')

_WRITTEN = {
    '(': '-lrb-', ')': '-rrb-', '[': '-lsb-', ']': '-rsb-', '{': '-lcb-',
    '}': '-rcb-', '\xbd': '1/2', '\xbc': '1/4', '\xbe': '3/4',
    '\u2153': '1/3', '\u2154': '2/3', '\u20ac': '$', '\xa3': '#',
    '\x80': '$', '\xa4': '$', '\u20a0': '$', '\xa2': 'cents',
    '&amp;': '&', '&lt;': '<', '&gt;': '>', '&quot;': "''",
    '&apos;': "'", '\u2026': '...', '\u2013': '--', '\u2014': '--',
    '\u2015': '--', '\u2012': '-', '\u2010': '-', '\u2011': '-',
    '\u201c': '``', '\u201d': "''", '"': "''", '\u2018': '`', '\u2019': "'",
    '\x91': '`', '\x92': "'", '\x93': '``', '\x94': "''", '\x85': '...',
    '\x96': '--', '\x97': '--', '\xab': '``', '\xbb': "''", '\u201b': '`',
    '\u2039': '`', '\u203a': "'",
}


def tokenize(caption, following=''):
  """Splits a caption as coco-caption does before its metrics.

  Args:
    caption: any string; line breaks count as spaces.
    following: text that the original would read after the caption; see
      `tokenize_all`.

  Returns:
    A list of lower-case tokens without coco-caption's punctuation.
  """
  caption = caption.replace('\n', ' ').replace('\xad', '')
  text = f'{caption}\n{following}'
  tokens, at = [], 0
  while at < len(caption):
    space = _SPACE.match(text, at)
    if space:
      at = space.end()
      continue
    # Nothing longer starts with letters that a space or ', ' ends.
    match = _PLAIN.match(text, at) or max(
        filter(None, (rule.match(text, at) for rule in _RULES)),
        key=lambda m: m.end())
    token = match.group(match.lastindex or 0)
    at += len(token)
    tokens += _written(token, text, at)
  return [t for t in tokens if t not in DROPPED]


def tokenize_all(captions):
  """Splits captions as one run of the original splits their lines.

  The original does not stop at line ends: whether a caption's final 'K.' is
  'k .' or 'k.' depends on the first word of the next line. We do the same, so
  that figures equal the official ones. It affects one caption in thousands.

  Args:
    captions: list of strings.

  Returns:
    A list of lists of tokens.
  """
  return [tokenize(c, f) for c, f in zip(captions, [*captions[1:], ''])]


def _written(token, text, end):
  """The tokens as the original prints them; `end`: position after it."""
  lower = token.lower()
  if lower in _SPLIT:
    return _SPLIT[lower].split()
  if lower in _WRITTEN:
    return [_WRITTEN[lower]]
  if re.fullmatch(_QUOTES, token):
    return [''.join(_WRITTEN.get(c, c) for c in token)]
  if len(token) == 1 and token not in _KNOWN and not '!' <= token <= '~':
    return []
  if len(token) == 2 and token[1] == '.' and _STARTER.match(text, end):
    return [lower[0]]  # and the full stop, which is dropped anyway
  if token[0].isdigit():
    return [lower.replace(' ', '\xa0')]  # '3 1/2'
  if re.fullmatch(r'-{2,5}', token):
    return ['--']
  if re.fullmatch(r'(?:\.\s?){3,5}', token):
    return ['...']
  for bracket in '()[]{}':
    if bracket in lower:
      lower = lower.replace(bracket, _WRITTEN[bracket])
  return [re.sub(_APOSTROPHE, "'", lower)]
