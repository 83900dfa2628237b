"""What the fields of a config may be, as far as each can be judged alone."""

from ddpm_jax import diffusion

CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "data.channels": (1, 3),
    "data.placement": ("host", "device"),
    "model.downsample_padding": (0, 1),
    "model.kind": ("unet", "linear_attention_unet"),
    "model.block": (None, "convnext", "resnet"),
    "model.attention": ("xla", "cudnn"),
    "diffusion.schedule": (*diffusion.SCHEDULES, "table"),
    "diffusion.prediction": diffusion.PREDICTIONS,
    "diffusion.loss": diffusion.LOSSES,
    "diffusion.loss_weight": diffusion.WEIGHTS,
    "optimizer.lr_decay": ("constant", "cosine"),
    "train.remat": ("none", "blocks", "dots"),
    "sampling.method": diffusion.METHODS,
    "sampling.spacing": diffusion.SPACINGS,
    "sampling.end": diffusion.ENDS,
    "sampling.variance": diffusion.VARIANCES,
}
POSITIVE = [
    "data.image_size",
    "model.base_channels",
    "model.num_res_blocks",
    "model.num_heads",
    "model.norm_epsilon",
    "diffusion.num_timesteps",
    "optimizer.learning_rate",
    "train.batch_size",
    "train.num_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.num_samples",
    "train.keep_last",
    "train.accumulate",
    "sampling.num_steps",
    "sampling.clip_range",
    "mesh.fsdp",
]
NOT_NEGATIVE = [
    "seed",
    "model.num_classes",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.grad_clip_norm",
    "optimizer.ema_start",
    "train.keep_every",
    "train.profile_start",
    "train.profile_steps",
    "sampling.steps_offset",
    "sampling.guidance",
    "sampling.max_threshold",
]
SHARES = ["model.dropout", "model.label_dropout", "optimizer.ema_decay", "sampling.dynamic_threshold"]  # in [0, 1)
