"""Every key of an ASIB run, with its default: the full-scale setting of the ablation ladder.

An experiment is a short diff of this file, e.g. `configs/l1_ib.py`; what a profile (`:digits`, `:small`, at full scale
the teachers' weights) changes stands in `configs/profiles.py`. docs/configuration.md maps the original system's keys to these.
"""
from ml_collections import ConfigDict, config_dict

from configs import profiles


def get_config(profile: str = "") -> ConfigDict:
    """The defaults under `profile` ("", "small" or "digits"), locked: an unknown key is an error."""
    config = defaults()
    profiles.apply(config, profile)
    return config.lock()


def defaults() -> ConfigDict:
    """Every key, before any profile."""
    config = ConfigDict()
    _run(config)
    _data_and_networks(config)
    _distillation(config)
    _fusion(config)
    _optimisation(config)
    return config


def _run(config: ConfigDict) -> None:
    config.seed = 0
    config.results_dir = "results"  # one folder a run, plus summary.csv and `latest`
    config.exp_id = ""  # "": config_profile_seed_timestamp; an explicit one that exists is an error
    config.student_epochs_per_stage = (20, 20)  # B-epochs of each stage
    config.num_stages = 0  # 0: the length of student_epochs_per_stage; another value must equal it
    config.teacher_adapt_epochs = 12  # A-epochs of each stage; 0: no A-Step and no fusion network
    config.restore_best = True  # continue from the best epoch on validation at the end of each stage
    config.train_control = False  # also train the same student without teachers, for the same epochs
    config.num_devices = 0  # of each host; 0: all
    config.scale_lr_with_devices = False  # multiply every learning rate by the devices of all hosts
    config.steps_per_call = 0  # training steps of one compiled call; 0: 32, or 1 where a CPU trains convolutions
    config.device_data_gb = 4.0  # GiB on each device for images and stored outputs; the rest waits on the host
    config.use_amp = True  # networks compute in amp_dtype; parameters, statistics and losses stay float32
    config.amp_dtype = "bfloat16"  # bfloat16, float16 (scales its loss dynamically), float32
    config.tensorboard = True
    config.wandb = ""  # a Weights & Biases project; "": off
    config.compilation_cache = "~/.cache/asib_jax/xla"  # keeps compiled programs between runs; "": off
    config.resume = ""  # "latest" or a run's folder: go on with that run instead of beginning one
    config.checkpoint_minutes = 10.0  # between the snapshots that a run goes on from; 0: none by time
    config.checkpoint_steps = 0  # the same in training steps; 0: none by steps
    config.max_nonfinite_steps = 20  # so many steps in a row without finite gradients end the run
    config.deterministic = False  # the same bits from every run on this machine; on CPUs they are so anyway
    config.platform = ""  # "gpu" or "cpu": refuse to run on anything else
    config.profile_steps = ()  # (10, 15): a jax profiler trace of the calls with those B-steps


def _data_and_networks(config: ConfigDict) -> None:
    config.dataset = ConfigDict()
    config.dataset.name = "cifar100"  # cifar100, digits, imagenet32, npz, folder
    config.dataset.path = ""  # a file or folder of one's own; "": look in data_dir, else download
    config.dataset.data_dir = ""  # where tfds and downloads live; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.dataset.batch_size = 64  # over all devices
    config.dataset.data_aug = 1  # 0 none, 1 crop and flip, 2 strong, 3 crop
    config.dataset.small_input = True  # 3x3 stride-1 stem without pooling (32x32 images)
    config.dataset.val_fraction = 0.1  # of the training split, stratified
    config.dataset.train_subset = 0  # training images A- and B-Steps use, stratified; 0: all

    config.model = ConfigDict()
    config.model.student = ConfigDict()
    config.model.student.name = "resnet101_scratch"
    config.model.student.weights = ""  # a file of pretrained weights (names ending in _pretrain)
    config.model.student.weights_sha256 = ""  # of that file: any other is refused; "": not compared
    config.model.student.mean = (0.5071, 0.4865, 0.4409)  # of the pixels in [0, 1] this network's weights expect
    config.model.student.std = (0.2673, 0.2564, 0.2762)
    config.model.student.use_adapter = False  # residual 1x1-convolution adapter after the last-but-one stage

    for name, network in (("teacher1", "convnext_l"), ("teacher2", "resnet152")):
        teacher = config[name] = ConfigDict()
        teacher.name = network
        teacher.weights = ""  # hf:OWNER/REPO, a .safetensors, .npz or .pth file, a checkpoint; "": trained from scratch
        teacher.weights_sha256 = ""  # of that file: any other is refused; "": not compared
        teacher.mean = (0.5071, 0.4865, 0.4409)
        teacher.std = (0.2673, 0.2564, 0.2762)
        teacher.saw_val = True  # the given weights were fitted on our validation images too
        teacher.train_epochs = 0  # from scratch, on the whole training split without validation
        teacher.train_lr = 1e-3
        teacher.train_weight_decay = 3e-4
        teacher.finetune_epochs = 0  # the same of given weights; 0: they are ready as they are
        teacher.finetune_lr = 1e-4
        teacher.finetune_weight_decay = 0.05
        teacher.finetune_freeze_level = -1  # as student_freeze_level
        teacher.warmup_epochs = 1  # this and what follows: of either training
        teacher.label_smoothing = 0.0
        teacher.finetune_use_cutmix = False
        teacher.finetune_cutmix_alpha = 1.0
        teacher.early_stopping_patience = 0  # epochs without a better validation accuracy; 0: never stop early
        teacher.early_stopping_min_delta = 0.0  # by which it must be better, in [0, 1]
        teacher.freeze_level = (-1,)  # as student_freeze_level; acts in A-Steps with use_teacher_finetuning
        teacher.freeze_bn = True
    config.a_step_views = 4  # V > 0: V fixed views per image, read by frozen networks once; 0: a new one each epoch
    config.b_step_views = 0  # the same of the B-Step: what the student sees, too
    config.bank_memory_gb = 8.0  # with more to store, networks read the same views at every step
    config.teacher_cache = ""  # a folder that keeps the frozen teachers' outputs between runs; "": none
    config.teachers_only = False  # make the teachers ready, measure them, and stop


def _distillation(config: ConfigDict) -> None:
    config.kd_target = "synergy"  # synergy, avg, weighted_conf, teacher
    config.kd_teacher_index = 0  # for kd_target="teacher", from 0
    config.ce_alpha = 0.65
    config.kd_alpha = 0.35
    config.kd_max_ratio = 2.0  # after the ramp KD weighs at most this many times the cross entropy; 0: no bound
    config.kd_warmup_epochs = 0  # ramp of the KD weight in the first stage
    config.kd_ens_alpha = 0.0  # share of the teachers' average in the synergy target ...
    config.teacher_adapt_kd_warmup = 0  # ... during the first epochs of every B-Step
    config.tau = 4.0
    config.tau_schedule = (2.0, 6.0)  # over the epochs of each step; (): constant tau
    config.tau_decay_power = 1.0
    config.feat_kd_alpha = 0.0
    config.feat_kd_key = ""  # the student's query: "distill_feat" or "feat_2d"; "": as the teachers are read
    config.use_loss_clamp = False
    config.loss_clamp_max = 1000.0
    config.ce_label_smoothing = 0.0  # B-Step
    config.mixup_alpha = 0.0  # B-Step; at most one of the two
    config.cutmix_alpha_distill = 0.0
    config.use_disagree_weight = False
    config.disagree_mode = "pred"  # pred, both_wrong, any_wrong
    config.disagree_lambda_high = 1.0
    config.disagree_lambda_low = 1.0
    config.use_partial_freeze = False  # act on the freeze levels
    config.student_freeze_level = (-1,)  # one, or one per stage; -1: all trains; 0: head, adapters; 1: last stage too
    config.student_freeze_bn = False  # normalisation stands still in blocks that train, too, whatever the level


def _fusion(config: ConfigDict) -> None:
    config.use_distillation_adapter = True
    config.distill_out_dim = 512
    config.distill_hidden_dim = 0  # 0: max(F // 2, distill_out_dim)
    config.use_ib = False
    config.ib_beta = 5e-5
    config.ib_beta_warmup_epochs = 8  # counted in A-epochs with the bottleneck active, over the run
    config.beta_schedule = ()  # (start, end, total) beats ib_beta
    config.ib_mbm_out_dim = 512
    config.ib_mbm_n_head = 4
    config.ib_mbm_feature_norm = "none"  # none, l2
    config.ib_mbm_residual = True
    config.ib_mbm_logvar_clip = 6.0
    config.ib_mbm_min_std = 1e-3
    config.ib_mbm_reg_lambda = 0.0
    config.synergy_head_dropout = 0.0
    config.synergy_temp_learnable = False
    config.min_cw = 0.1
    config.synergy_only_epochs = 6  # first A-epochs of the run: bottleneck, certainty and student terms off
    config.enable_kd_after_syn_acc = 0.05  # validation accuracy of the synergy ensemble that opens the gate
    config.synergy_ce_alpha = 0.6
    config.synergy_kd_alpha = 1.0  # keeps the synergy target soft; 0 is the original
    config.synergy_ema_alpha = 0.8
    config.label_smoothing = 0.0  # A-Step
    config.teacher_adapt_alpha_kd = config_dict.placeholder(float)  # None: kd_alpha
    config.use_cccp = False
    config.cccp_alpha = 0.25
    config.cccp_nt = 1  # with use_cccp, multiplies the A-epochs ...
    config.cccp_ns = 1  # ... and the B-epochs
    config.train_distill_adapter_only = False  # A-Step also trains the teachers' adapters
    config.use_teacher_finetuning = False  # A-Step also trains the teachers, under their freeze_level
    config.reg_lambda = 0.0  # on trained teacher tensors


def _optimisation(config: ConfigDict) -> None:
    config.optimizer = "adamw"  # of the student: adamw, sgd (Nesterov)
    config.momentum = 0.9  # sgd
    config.student_lr = 1e-3
    config.student_weight_decay = 3e-4
    config.grad_clip_norm = 0.5  # global norm, every optimizer; 0: off
    config.a_step_lr = 1e-4
    config.ib_mbm_lr_factor = 10.0  # IB_MBM and synergy head learn at a_step_lr times this
    config.teacher_lr = config_dict.placeholder(float)  # None: a_step_lr
    config.a_step_weight_decay = 0.0
    config.schedule = ConfigDict()
    config.schedule.type = "cosine"  # cosine, step, multistep
    config.schedule.lr_warmup_epochs = 5
    config.schedule.min_lr = 1e-5
    config.schedule.step_size = 10  # epochs
    config.schedule.gamma = 0.1
    config.schedule.milestones = ()  # epochs
