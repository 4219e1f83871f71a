"""Language filter: keeps the languages that are wanted, by `py3langid`, whose model comes with the package.

A document goes only when the identifier is sure that it is another language; short texts, code and lists leave it
unsure, and stay.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from glm5.errors import DataError

SURE = 0.8
SHORTEST = 200
"""Characters; less is not judged."""
READ = 4000
"""Characters that are looked at."""


class LanguageFilter:
    """Judges one text at a time. languages: ISO 639-1 codes, such as `en`."""

    def __init__(self, languages: Sequence[str]) -> None:
        try:
            langid = importlib.import_module("py3langid.langid")
        except ImportError:
            raise DataError("py3langid is not installed to tell languages; pip install glm5[data].") from None
        self.identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
        unknown = sorted(set(languages) - set(self.identifier.labels))
        if unknown:
            raise DataError(f"there is no language {unknown[0]!r}; give ISO 639-1 codes, such as en or de.")
        self.languages = frozenset(languages)

    def other(self, text: str) -> str | None:
        """The language of a text that is surely none of those wanted; else None."""
        if len(text) < SHORTEST:
            return None
        language, probability = self.identifier.classify(text[:READ])
        return None if language in self.languages or probability < SURE else str(language)
