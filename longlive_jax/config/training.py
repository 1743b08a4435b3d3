"""Checks of a config for trainers, apart from its own checks: samplers need none of them."""

from longlive_jax.config.config import Config
from longlive_jax.config.section import divides, refuse
from longlive_jax.recipes import RECIPES


def validate_training(config: Config) -> None:
    """Refuses a config that the transformer's trainer cannot run.

    Raises:
      InputError: the setting, its value, the limit and the way out.
    """
    m, t, d, mesh = config.model, config.train, config.data, config.mesh
    _trains("quant.recipe", config.quant.recipe)
    divides("train.latent_frames", t.latent_frames, "model.chunk_frames", m.chunk_frames)
    chunks = t.latent_frames // m.chunk_frames
    divides("train.latent_frames / model.chunk_frames", chunks, "mesh.seq", mesh.seq)
    divides("train.batch_size", t.batch_size, "mesh.data * mesh.fsdp", mesh.data * mesh.fsdp)
    if t.trainable == "actions" and m.actions.kind == "none":
        refuse(
            "train.trainable='actions'",
            "with actions.kind='none': there is no action path to train; set actions.kind, or "
            "train.trainable='all'",
        )
    if t.trainable == "lora":
        config.distill.lora.check(m)
    if t.eval_grade and not t.eval_every:
        refuse(
            f"train.eval_grade={t.eval_grade!r}",
            "needs evaluations; set train.eval_every, or train.eval_grade=''",
        )
    if d.min_chunks > chunks:
        refuse(f"data.min_chunks={d.min_chunks}", f"must be 1 to {chunks}, a sample's chunks")
    width = config.video.latent_size[1]
    if d.encode == "width" and not d.cached and width % mesh.seq:
        refuse(
            f"video.width={config.video.width}, {width} latents,",
            f"must be a multiple of mesh.seq={mesh.seq} latents for data.encode='width'; "
            "set data.encode='halo'",
        )


def _trains(name: str, value: str) -> None:
    recipe = RECIPES[value]
    if recipe is not None and recipe.gradients is None:
        refuse(
            f"{name}={value!r}",
            "is for sampling; train in one of "
            + ", ".join(name for name, r in RECIPES.items() if r is None or r.gradients),
        )


def validate_distillation(config: Config) -> None:
    """Refuses a config that the distillation's trainer cannot run.

    Raises:
      InputError: the setting, its value, the limit and the way out.
    """
    m, d, mesh = config.model, config.distill, config.mesh
    if config.objective == "consistency":
        validate_training(config)
    _trains("quant.recipe", config.quant.recipe)
    _trains("distill.critic_recipe", d.critic_recipe)
    divides("distill.latent_frames", d.latent_frames, "model.chunk_frames", m.chunk_frames)
    divides("distill.least_frames", d.least_frames, "model.chunk_frames", m.chunk_frames)
    chunks = d.latent_frames // m.chunk_frames
    divides("distill.latent_frames / model.chunk_frames", chunks, "mesh.seq", mesh.seq)
    divides("distill.batch_size", d.batch_size, "mesh.data * mesh.fsdp", mesh.data * mesh.fsdp)
    if config.sample.guided:
        refuse(
            f"sample.guidance_scale={config.sample.guidance_scale}",
            "must be 1.0: the student learns the guided teacher, and is sampled without guidance; "
            f"the teacher's is distill.guidance={d.guidance}",
        )
    if m.actions.guided:
        refuse(
            f"actions.guidance={m.actions.guidance}",
            "must be 1.0: the student learns the guided teacher, and is sampled without guidance; "
            f"the teacher's is distill.action_guidance={d.action_guidance}",
        )
    if d.action_guidance and m.actions.kind == "none":
        refuse(
            f"distill.action_guidance={d.action_guidance}",
            "with actions.kind='none': there are no actions to leave out; set it to 0",
        )
    if config.quant.kv != "bf16" and config.distill.gradient == "through":
        refuse(
            "distill.gradient='through'",
            f"with quant.kv={config.quant.kv!r}: keys and values of a quantised cache have no "
            "gradient; set distill.gradient='stop' or quant.kv='bf16'",
        )
    if d.lora.enabled:
        d.lora.check(m)
    elif d.init == "base_then_transplant":
        refuse(
            "distill.init='base_then_transplant'",
            "with distill.lora.enabled=False: only adapters are put on another model; set "
            "distill.init='ar', or train adapters",
        )


def validate_vae_training(config: Config) -> None:
    """Refuses a config that the VAE's trainer cannot run.

    Raises:
      InputError: the setting, its value, the limit and the way out.
    """
    t, v, mesh = config.train_vae, config.vae, config.mesh
    if v.kind != "wan":
        refuse(f"vae.kind={v.kind!r}", "is only decoded with; train one of vae.kind='wan'")
    if t.warmup_steps >= t.steps:
        refuse(
            f"train_vae.warmup_steps={t.warmup_steps}", f"must be below train_vae.steps={t.steps}"
        )
    if any(v.latent_mean) or any(value != 1 for value in v.latent_std):
        refuse(
            f"vae.latent_mean={v.latent_mean}, vae.latent_std={v.latent_std}",
            "must be zeros and ones: the trainer puts the statistics that it measures into the "
            "weights",
        )
    if mesh.seq != 1:
        refuse(f"mesh.seq={mesh.seq}", "must be 1: clips are spread whole, over data and fsdp")
    divides("train_vae.batch_size", t.batch_size, "mesh.data * mesh.fsdp", mesh.data * mesh.fsdp)
    for side in ("height", "width"):
        crop, whole = getattr(t, f"crop_{side}"), getattr(config.video, side)
        if crop > whole:
            refuse(f"train_vae.crop_{side}={crop}", f"must be at most video.{side}={whole}; 0: all")
