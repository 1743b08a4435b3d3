"""The optimiser that objectives share."""

import optax


def adamw(
    rate: optax.ScalarOrSchedule,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm.

    With beta1 = 0 Adam's first moment is the gradient itself and is not kept.
    """
    if beta1 == 0:
        scale = optax.scale_by_rms(beta2, epsilon, eps_in_sqrt=False, bias_correction=True)
    else:
        scale = optax.scale_by_adam(beta1, beta2, epsilon)
    decay = (optax.add_decayed_weights(weight_decay),) if weight_decay else ()
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        scale,
        *decay,
        optax.scale_by_learning_rate(rate),
    )
