"""For tests of the training loop: its options, a way to stop it, and the weights that it left."""

from ppcl.training import loop

OPTIONS = loop.Optimisation(
    steps=12,
    lr=0.02,
    warmup_steps=3,
    clip_norm=0.5,
    weight_decay=0.1,
    checkpoint_every=4,
    log_every=3,
)


class Stop(Exception):
    """Ends a training from outside."""


def stop_at(step):
    def before(here):
        if here == step:
            raise Stop

    return before


def weights(modules):
    return {
        f"{n}/{k}": p.detach().clone() for n, m in modules.items() for k, p in m.named_parameters()
    }
