"""Frames and steering of CarRacing-v3, driven by a scripted expert, in three looks; kept in the cache.

The expert pursues a point of the track ahead of the car and is pushed off the line now and then, so that the frames
show how to come back. Needs `pip install "gymnasium[box2d]"`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from packages import cache_folder

LOOKS = ("day", "night", "swapped")
"""As rendered; inverted; red and blue exchanged."""

WARM_UP = 50
"""Frames of the camera's approach, in which nothing is to be learnt."""

_AHEAD = 6
_PUSH = 0.04


@dataclass(frozen=True)
class Drive:
    """One round of a track.

    Attributes:
      frames: uint8 [n, 24, 24, 3], means of 4 x 4 pixels.
      steering: float32 [n], the expert's, -1 (left) to 1.
    """

    frames: np.ndarray
    steering: np.ndarray


def drives(tracks: range, steps: int = 400) -> list[Drive]:
    """A drive for each track, by its seed; every second frame is kept."""
    return [_kept(cache_folder() / "car-racing", track, steps) for track in tracks]


def seen(frames: np.ndarray, look: str) -> np.ndarray:
    """float32 [n, 24, 24, 3] in 0..1, as one of `LOOKS`."""
    pixels = frames.astype(np.float32) / 255
    if look == "night":
        return 1 - pixels
    return pixels[..., ::-1] if look == "swapped" else pixels


def _kept(folder: Path, track: int, steps: int) -> Drive:
    file = folder / f"track-{track}-{steps}.npz"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        drive = _driven(track, steps)
        partial = file.with_suffix(".partial.npz")
        np.savez_compressed(partial, frames=drive.frames, steering=drive.steering)
        partial.rename(file)
    with np.load(file) as found:
        return Drive(found["frames"], found["steering"])


def _driven(track: int, steps: int) -> Drive:
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise SystemExit('driving needs gymnasium: pip install "gymnasium[box2d]"') from error
    rng = np.random.default_rng(track)
    world = gymnasium.make("CarRacing-v3", render_mode=None).unwrapped
    frame, _ = world.reset(seed=track)
    frames, steering = [], []
    push = 0.0
    for step in range(WARM_UP + steps):
        wanted = _steering(world)
        if rng.random() < _PUSH:
            push = rng.normal() * 0.6
        push *= 0.85
        speed = float(np.hypot(*world.car.hull.linearVelocity))
        gas = 0.3 if speed < 30 else 0.0
        action = np.array([np.clip(wanted + push, -1, 1), gas, 0.1 if speed > 45 else 0.0])
        if step >= WARM_UP and step % 2 == 0:
            frames.append(_small(frame))
            steering.append(wanted)
        frame, _, ended, cut, _ = world.step(action)
        if ended or cut:
            break
    world.close()
    return Drive(np.stack(frames), np.asarray(steering, np.float32))


def _steering(world: Any) -> float:
    """Towards the point of the track that lies some tiles ahead of the nearest."""
    line = np.array([tile[2:4] for tile in world.track])
    place = np.array(world.car.hull.position)
    nearest = int(np.argmin(((line - place) ** 2).sum(1)))
    target = line[(nearest + _AHEAD) % len(line)] - place
    heading = world.car.hull.angle
    side = np.cos(heading) * target[0] + np.sin(heading) * target[1]
    ahead = -np.sin(heading) * target[0] + np.cos(heading) * target[1]
    return float(np.clip(2.0 * np.arctan2(side, ahead), -1, 1))


def _small(frame: np.ndarray) -> np.ndarray:
    """The road without the bar of instruments, [24, 24, 3]."""
    return frame.reshape(24, 4, 24, 4, 3).mean((1, 3)).round().astype(np.uint8)
