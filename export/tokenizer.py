"""Write open_clip's tokenizers as a Hugging Face `tokenizers` JSON, which the server reads without torch."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import open_clip
import regex
import tokenizers
from open_clip import tokenizer as reference
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from vilu import atomic
from vilu.clip import Clip
from vilu.errors import UserError
from vilu.preprocess.text import TextTransform

# The end of SimpleTokenizer's pattern, after its special tokens. The whole pattern ignores case.
PATTERN = r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
SUFFIX = "</w>"

_CLEAN = {reference.get_clean_fn(mode): mode for mode in ("lower", "whitespace", "canonicalize")}
_CHARACTERS = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF)
# Replacements that do what ftfy and HTML unescaping do to common strings, for readers of the file that have neither.
_REPLACEMENTS = [
    (r"[\x00-\x08\x0B\x0E-\x1F\x7F\x{206A}-\x{206F}\x{FEFF}\x{FFF9}-\x{FFFC}]", ""),
    ("&(?:amp;)+", "&"),
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&quot;", '"'),
    ("&(?:#39|#x27|apos);", "'"),
    ("&nbsp;", " "),
    (r"[\x{2BC}\x{2018}-\x{201B}]", "'"),
    (r"[\x{201C}-\x{201F}]", '"'),
]


def write_tokenizer(clip: Clip, path: str | os.PathLike[str]) -> TextTransform:
    """Write the tokenizer of a CLIP; the same tokenizer gives the same file, byte for byte.

    `vilu.preprocess.text.Tokenizer(path, transform)`, with the returned transform, gives the ids of `clip.tokenize`.
    `tokenizers.Tokenizer.from_file(path)` gives the same ids for text that `vilu.preprocess.text.clean` leaves
    unchanged, and for most other text: the file's normalizer has no ftfy and few HTML entities.

    Raises:
        UserError: the tokenizer has no JSON form with the same ids, or the file cannot be written.
    """
    clip.tokenize([""])  # raises where the tokenizer's files could not be loaded
    try:
        document, transform = convert(clip.tokenize)
    except UserError as error:
        raise UserError(f"CLIP {clip.spec.name}: its tokenizer cannot be exported: {error}") from None
    atomic.write(path, document)
    return transform


def convert(tokenizer: object) -> tuple[str, TextTransform]:
    """The JSON of an open_clip tokenizer, and what must be done to a text before and to its ids after.

    Raises:
        UserError: the tokenizer has no JSON form with the same ids.
    """
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return _byte_pairs(tokenizer).to_str(), TextTransform(_clean_mode(tokenizer.clean_fn))
    if isinstance(tokenizer, reference.HFTokenizer):
        if tokenizer.tokenizer_mode:
            raise UserError(f"tokenizer mode {tokenizer.tokenizer_mode!r} has no JSON form; use a CLIP without it")
        zero = tokenizer.tokenizer.sep_token_id if tokenizer.strip_sep_token else None
        transform = TextTransform(_clean_mode(tokenizer.clean_fn), True, -1 if zero is None else int(zero))
        return _backend(tokenizer).to_str(), transform
    if isinstance(tokenizer, reference.SigLipTokenizer):
        return _backend(tokenizer).to_str(), TextTransform("canonicalize", True)
    raise UserError(
        f"it is a {type(tokenizer).__name__}, not open_clip's SimpleTokenizer, HFTokenizer or SigLipTokenizer"
    )


def _clean_mode(function: object) -> str:
    if function not in _CLEAN:
        raise UserError(f"its cleaning is not one of open_clip's ({', '.join(_CLEAN.values())})")
    return _CLEAN[function]


def _length(tokenizer: open_clip.SimpleTokenizer | reference.HFTokenizer | reference.SigLipTokenizer) -> int:
    length = tokenizer.context_length
    if not length or length < 3:
        raise UserError(f"its context length is {length}, at least 3 is needed")
    return int(length)


def _byte_pairs(source: open_clip.SimpleTokenizer) -> tokenizers.Tokenizer:
    """CLIP's byte-level BPE."""
    if source.reduction_fn is not None:
        raise UserError("its reduction_mask drops tokens of long texts at random; load it without reduction_mask")
    specials = [source.decoder[i] for i in source.all_special_ids]
    if len(specials) > 2:
        raise UserError(f"its additional_special_tokens ({', '.join(specials[2:])}) have no JSON form")
    if source.pat.pattern != "|".join(specials) + PATTERN:
        raise UserError("its pattern is not that of open_clip's SimpleTokenizer")
    symbols = set(source.byte_encoder.values())
    symbols |= {symbol + SUFFIX for symbol in symbols}
    for pair in source.bpe_ranks:
        # In this order every token has one derivation, so merging the best pair everywhere (open_clip) and merging
        # one occurrence at a time (tokenizers) end alike.
        if len(pair) != 2 or not symbols.issuperset(pair) or "".join(pair) in symbols:
            raise UserError(f"its merges file is not in the order of training at {' '.join(pair)!r}")
        symbols.add("".join(pair))
    target = tokenizers.Tokenizer(_with_specials(source, specials))
    mode = _clean_mode(source.clean_fn)
    steps: list[Any] = [normalizers.Replace(Regex(pattern), to) for pattern, to in _REPLACEMENTS]
    steps += [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    target.normalizer = normalizers.Sequence(steps if mode == "whitespace" else [*steps, normalizers.Lowercase()])
    target.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_pattern(tuple(specials))), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    first, last = specials[:2]
    target.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(first, source.sot_token_id), (last, source.eot_token_id)],
    )
    target.decoder = decoders.BPEDecoder(SUFFIX)
    length = _length(source)
    target.enable_truncation(length)
    target.enable_padding(length=length, pad_id=0, pad_token=source.decoder[0])
    return target


def _with_specials(source: open_clip.SimpleTokenizer, specials: list[str]) -> models.BPE:
    """The model, with merges of the lowest ranks that make one token of a special token's own spelling.

    open_clip finds "<start_of_text>" in a text only where a new piece begins (not in "!<start_of_text>"), which an
    added token of the file would not respect. As pieces mix letters and signs nowhere else (but in contractions), a
    chain of merges over the parts touches no other text. Its intermediate tokens have ids past the vocabulary; with
    "whitespace", which keeps capitals, they would surface in a text that spells one as "<start_of_TEXT>".
    """
    vocabulary = dict(source.encoder)
    merges = list(source.bpe_ranks)
    spare = itertools.count(len(vocabulary))
    for special in specials:
        index = vocabulary.pop(special)
        model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=SUFFIX)
        parts = [token.value for token in model.tokenize(special)]
        wholes = list(itertools.accumulate(parts))
        merges += zip(wholes, parts[1:], strict=False)
        vocabulary |= zip(wholes[1:-1], spare, strict=False)
        vocabulary[wholes[-1]] = index
    return models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=SUFFIX)


@lru_cache
def _pattern(specials: tuple[str, ...]) -> str:
    """SimpleTokenizer's pattern with every class spelled out as ranges of characters.

    The runtime's tables are of an older Unicode than `regex`'s: thousands of letters (CJK extensions) would be signs.
    """

    def characters(pattern: str) -> list[str]:
        return regex.findall(pattern, _CHARACTERS, regex.IGNORECASE)

    folded: dict[str, str] = {}
    words = []
    for word in (*specials, *CONTRACTIONS):
        for c in word:
            folded.setdefault(c, f"[{_ranges(characters(c))}]" if c.isalpha() else c)
        words.append("".join(folded[c] for c in word))
    letters, numbers = _ranges(characters(r"[\p{L}]")), _ranges(characters(r"[\p{N}]"))
    space = set(_CHARACTERS).difference(*(characters(p) for p in (r"[\p{L}]", r"[\p{N}]", r"[^\s\p{L}\p{N}]")))
    return "|".join([*words, f"[{letters}]+", f"[{numbers}]", f"[^{_ranges(sorted(space))}{letters}{numbers}]+"])


def _ranges(characters: Iterable[str]) -> str:
    runs: list[list[int]] = []
    for c in map(ord, sorted(characters)):
        if runs and runs[-1][1] == c - 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    return "".join(rf"\x{{{a:X}}}" if a == b else rf"\x{{{a:X}}}-\x{{{b:X}}}" for a, b in runs)


def _backend(source: reference.HFTokenizer | reference.SigLipTokenizer) -> tokenizers.Tokenizer:
    """What transformers' fast tokenizer runs, with the truncation and padding that open_clip asks of it."""
    outer = source.tokenizer
    backend = getattr(outer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise UserError(f"{type(outer).__name__} is not a fast one; put its tokenizer.json into the CLIP's folder")
    if getattr(outer, "split_special_tokens", False):
        raise UserError("split_special_tokens has no JSON form; set it to false in its tokenizer_config.json")
    if outer.pad_token_id is None:
        raise UserError("it has no padding token; name a pad_token in its tokenizer_config.json")
    length = _length(source)
    target = tokenizers.Tokenizer.from_str(backend.to_str())
    target.enable_truncation(length, direction=outer.truncation_side)
    target.enable_padding(
        length=length,
        direction=outer.padding_side,
        pad_id=outer.pad_token_id,
        pad_type_id=outer.pad_token_type_id,
        pad_token=str(outer.pad_token),
    )
    return target
