"""Under which keys a directory holds its values: as ``FSDPStrategy`` does, for Lightning's ``consolidate_checkpoint``.

In this package they are called ``state_dict.NAME`` and ``optimizers.AT.NAME.ENTRY``, which were the keys until 0.1.0.
"""

import re

MODEL, GROUPS = "model", "param_groups"
_STATE = re.compile(r"optimizer_(\d+)\.state\.(.+)", re.DOTALL)


def optimizer(at: int) -> str:
    """The key under which the state of optimizer ``at`` is."""
    return f"optimizer_{at}"


def called(key: str) -> str:
    """What this package calls the value that is under ``key``.

    >>> called("model.net.weight"), called("optimizer_0.state.net.weight.exp_avg"), called("state_dict.net.weight")
    ('state_dict.net.weight', 'optimizers.0.net.weight.exp_avg', 'state_dict.net.weight')
    """
    if key.startswith(f"{MODEL}."):
        return "state_dict" + key.removeprefix(MODEL)
    found = _STATE.fullmatch(key)
    return key if found is None else f"optimizers.{found[1]}.{found[2]}"
