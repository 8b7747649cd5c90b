"""Log-mel features of sound, by librosa, as Whisper was trained on them.

Reference: section 2.2 of Radford et al., Robust speech recognition via large-scale weak supervision
(2022), https://arxiv.org/abs/2212.04356
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from adapters_jax.errors import UserError, needed
from adapters_jax.finetune.models.whisper.config import WhisperConfig

RATE = 16_000  # samples a second
HOP = 160  # samples from one frame to the next
WINDOW = 400  # samples


def log_mel(
    sounds: Sequence[Float[np.ndarray, " samples"]], config: WhisperConfig
) -> Float[np.ndarray, "batch mels frames"]:
    """Computes the features that a Whisper reads.

    Args:
        sounds: samples between -1 and 1, 16,000 a second, as `librosa.load(path, sr=16000)[0]`
            reads them from a file. Each is padded with silence to the model's length, 30 seconds
            for the published models.
        config: the model's configuration.

    Returns:
        float32 features `(batch, num_mel_bins, 2 * max_source_positions)`.

    Raises:
        UserError: a sound is longer than the model's length, empty, of several channels, or not
            finite floating-point numbers.
        MissingPackageError: librosa is not installed.

    Example:
        >>> sound = np.sin(np.arange(16_000, dtype=np.float32))
        >>> log_mel([sound], WhisperConfig()).shape  # doctest: +SKIP
        (1, 80, 3000)
    """
    # The tests do not run the example, since librosa compiles by numba for 20 seconds.
    with needed("log-mel features", "librosa", "audio"):
        import librosa
    frames = 2 * config.max_source_positions
    samples = frames * HOP
    for number, sound in enumerate(sounds):
        _check(number, sound, samples)
    padded = np.stack([np.pad(x, (0, samples - len(x))) for x in sounds]).astype(np.float32)
    power = librosa.feature.melspectrogram(
        y=padded,
        sr=RATE,
        n_fft=WINDOW,
        hop_length=HOP,
        n_mels=config.num_mel_bins,
        pad_mode="reflect",
    )
    # One frame more than hops, since the frames' middles are at both ends of the sound.
    bels = np.log10(np.maximum(power[..., :frames], 1e-10))
    loudest = bels.max((1, 2), keepdims=True)
    return ((np.maximum(bels, loudest - 8.0) + 4.0) / 4.0).astype(np.float32)


def _check(number: int, sound: Float[np.ndarray, " samples"], most: int) -> None:
    found = f"sound {number} has the shape {sound.shape} of {sound.dtype}"
    if sound.ndim != 1 or not np.issubdtype(sound.dtype, np.floating):
        raise UserError(
            f"{found}, expected one channel of floating-point samples between -1 and 1; "
            "librosa.load(path, sr=16000, mono=True)[0] reads them"
        )
    if not 0 < len(sound) <= most:
        raise UserError(
            f"sound {number} has {len(sound)} samples, expected 1 to {most}, which are "
            f"{most / RATE:g} seconds; cut it into pieces"
        )
    if not np.isfinite(sound).all():
        raise UserError(f"sound {number} has samples that are not finite numbers")
