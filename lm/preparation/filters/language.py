"""Language of a document by py3langid (97 languages; its model comes with the package)."""

from lm.preparation.filters import Filter, each_field, installed, words

PACKAGES = ("py3langid",)


def build(*, keep: str = "en", min_probability: float = 0.65) -> Filter:
    """Return the filter that drops documents of other languages, with the reason language/CODE.

    keep: codes of ISO 639-1, separated by commas. min_probability: of the most probable language;
    below it, a document is dropped as language/unsure.
    """
    if not 0 <= min_probability <= 1:
        raise ValueError(
            f"--filter=language min_probability ({min_probability:g}) must be in [0, 1]"
        )
    langid = installed("py3langid.langid", "py3langid")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    kept = words("--filter=language keep", keep, sorted(identifier.labels))

    def judge(text: str) -> tuple[str, str]:
        language, probability = identifier.classify(text)
        if probability < min_probability:
            return "", "unsure"
        return text, "" if language in kept else language

    return each_field("language", judge)
