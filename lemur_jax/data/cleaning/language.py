"""The language of a text, by langdetect."""

from collections.abc import Callable

from lemur_jax.config import ConfigError


def language_detector(seed: int = 0) -> Callable[[str], str | None]:
    """The function text -> ISO 639-1 code; None where there is nothing to tell it by.

    Args:
      seed: langdetect samples; the same seed gives the same answer.

    Raises:
      ConfigError: langdetect is not installed.
    """
    try:
        import langdetect  # late: its profiles take half a second
    except ImportError as error:
        raise ConfigError(
            [
                f"languages are told by langdetect ({error}): pip install langdetect, or set "
                "`field` to where the record says it"
            ]
        ) from error
    langdetect.DetectorFactory.seed = seed  # it draws at random otherwise

    def detect(text: str) -> str | None:
        try:
            return langdetect.detect(text)
        except langdetect.LangDetectException:
            return None  # numbers, signs

    return detect
