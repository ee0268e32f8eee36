"""stub"""

from reproduce.courses import BYTES, Course

SEEDS = (0, 1, 2)
STEPS, LR = 2400, 2e-3
VOCABULARIES = (BYTES, 2048, 8192)
EARLY, SETTLED = 100, 400
POINTS = (0, 50, EARLY, 200, SETTLED, 800, 1200, 1600, 2000, STEPS)


def long_run(seed: int, style: str = "gpt2") -> Course:
    measured = tuple((step, 64 if step == SETTLED else 12) for step in POINTS)
    return Course("long", seed, STEPS, LR, style, evaluated=POINTS, measured=measured)


def short_run(seed: int, vocab: int) -> Course:
    return Course(
        f"{vocab} tokens", seed, STEPS, LR, vocab=vocab, until=EARLY, measured=((EARLY, 12),)
    )
