"""`--device`: where JAX computes, settled before it looks for devices."""

import enum


class Device(enum.StrEnum):
    """A kind of device."""

    cpu = "cpu"
    gpu = "gpu"
    tpu = "tpu"


_EXTRAS = {Device.gpu: "jaxmerge[cuda12] or jaxmerge[cuda13]", Device.tpu: "jaxmerge[tpu]"}


def use(device: Device) -> None:
    """Makes JAX compute on a kind of device.

    Raises:
        ValueError: there is none; the message says what there is.
    """
    import jax

    # On an accelerator JAX chooses itself: it is then also the only one that knows its alias.
    platforms = "cpu" if device is Device.cpu else ""
    if (jax.config.jax_platforms or "") != platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", platforms)
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise ValueError(f"--device {device}: {error}") from None
    if found != device:
        # One plug-in is installed and another asked for, or a CPU was forced in this process.
        hint = f"; install {_EXTRAS[device]}, see `jaxmerge doctor`" if device in _EXTRAS else ""
        raise ValueError(f"--device {device}: JAX finds no such device, only {found}{hint}")
