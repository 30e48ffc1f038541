# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Final

__version__: Final[str]

# models
from .loading import load_base as load_base
from .families import as_base as as_base
from .bases import Base as Base
from .loading import embedded_bases as embedded_bases
from .random_pipes import random_pipe as random_pipe
from .memory import estimate_memory as estimate_memory
from .memory import Memory as Memory
from .memory import memory_bars as memory_bars

# the value
from .lora import Lora as Lora
from .lora import Factors as Factors
from .lora import add_factors as add_factors
from .names import canonical as canonical
from .names import block_of as block_of
from .names import COMPONENTS as COMPONENTS
from .names import STREAMS as STREAMS
from .names import BLOCKS as BLOCKS

# wearing a LoRA
from .injection import apply_lora as apply_lora
from .injection import remove_lora as remove_lora
from .injection import set_scale as set_scale
from .injection import extract_lora as extract_lora
from .worn import adapters as adapters
from .injection import disabled as disabled
from .injection import inject_lora as inject_lora
from .injection import find_targets as find_targets
from .injection import TARGETS as TARGETS
from .injection import MMDIT_TARGETS as MMDIT_TARGETS
from .report import Report as Report

# layers
from .layers import LoraLayer as LoraLayer
from .layers import LoraInjectedLinear as LoraInjectedLinear
from .layers import LoraInjectedConv2d as LoraInjectedConv2d
from .layers import set_scales as set_scales

# files
from .formats import load_lora as load_lora
from .formats import save_lora as save_lora
from .formats import FORMATS as FORMATS
from .conversion import convert_lora as convert_lora
from .conversion import fit_format as fit_format
from .conversion import lora_file_info as lora_file_info
from .conversion import trigger_words as trigger_words

# extracting and merging
from .extraction import distill as distill
from .extraction import distillation as distillation
from .extraction import resize as resize
from .checkpoints import save_checkpoint as save_checkpoint
from .checkpoints import merge_checkpoint as merge_checkpoint

# combining
from .composition import compose as compose
from .lora import triggers_of as triggers_of
from .mixing import learn_weights as learn_weights
from .mixing import zip_columns as zip_columns

# schedules
from .schedule import LoraSchedule as LoraSchedule
from .scheduling import scheduled as scheduled
from .schedule import ramp as ramp
from .schedule import interpolate as interpolate
from .schedule import parse_schedule as parse_schedule
from .schedule import parse_lora as parse_lora
from .schedule import lora_switch as lora_switch
from .schedule import LoraComposite as LoraComposite
from .schedule import trained_schedule as trained_schedule

# pictures and captions
from .preprocessing import preprocess as preprocess
from .preprocessing import settings_for as settings_for
from .pictures import find_pictures as find_pictures
from .pictures import open_picture as open_picture
from .dataset import ConceptDataset as ConceptDataset
from .captions import captions_of as captions_of

# training
from .recipe import recipe_card as recipe_card
from .recipe import recipe_for as recipe_for
from .recipe import Recipe as Recipe
from .dreambooth import train_dreambooth as train_dreambooth
from .dreambooth import DreamBooth as DreamBooth
from .dreambooth import Concept as Concept
from .dreambooth import load_concepts as load_concepts
from .dreambooth import class_pictures as class_pictures
from .textual_inversion import train_textual_inversion as train_textual_inversion
from .textual_inversion import TextualInversion as TextualInversion
from .textual_inversion import inversion_recipe_for as inversion_recipe_for
from .textual_inversion import neighbours as neighbours
from .pti import train_pti as train_pti
from .pti import PivotalTuning as PivotalTuning
from .pti import pivotal_recipe_for as pivotal_recipe_for
from .training import Trainer as Trainer
from .samples import Stream as Stream
from .log import TrainingLog as TrainingLog

# Stable Diffusion 3.5
from .sd3 import attention_maps as attention_maps
from .sd3 import shift_for as shift_for
from .sd3 import block_groups as block_groups

# few steps
from .turbo import TurboRun as TurboRun
from .turbo import turbo_plan as turbo_plan
from .turbo import turbo_recipe as turbo_recipe
from .turbo import turbocharged as turbocharged
from .turbo import with_turbo as with_turbo
from .turbo import turbo_settings as turbo_settings

# judging
from .evaluation import evaluate as evaluate
from .similarity import Dino as Dino
from .similarity import Clip as Clip
from .similarity import diversity as diversity
from .similarity import overfitting as overfitting
from .similarity import thumbnails as thumbnails
from .similarity import drift as drift
from .evaluation import bootstrap as bootstrap
from .evaluation import paired_bootstrap as paired_bootstrap
from .evaluation import wearing as wearing

# showing
from .show import grid as grid
from .show import before_after as before_after
from .show import curve as curve
from .show import bars as bars
from .show import heat as heat
from .show import to_image as to_image
from .show import save_jpeg as save_jpeg

# studio
from .studio import Studio as Studio
from .cli.pages import lora_studio as lora_studio

# in the browser
from .live import export_live as export_live
from .live import serve_live as serve_live
from .live import show_live as show_live

# lessons
from .lessons import lesson_base as lesson_base
from .lessons import lesson_places as lesson_places
from .lessons import lesson_pictures as lesson_pictures
from .lessons import lesson_cost as lesson_cost
from .lessons import at_once as at_once
from .lessons import for_diffusers as for_diffusers
from .lessons import take_away as take_away

# commands
from .cli.files import lora_ppim as lora_ppim
from .cli.train import lora_dreambooth as lora_dreambooth
from .cli.train import lora_ti as lora_ti
from .cli.train import lora_pti as lora_pti
from .cli.draw import lora_generate as lora_generate
from .cli.draw import lora_evaluate as lora_evaluate
from .cli.files import lora_info as lora_info
from .cli.files import lora_convert as lora_convert
from .cli.files import lora_distill as lora_distill
from .cli.files import lora_memory as lora_memory
from .cli.pages import lora_live as lora_live

# errors
from .core import LoraError as LoraError
from .core import FormatError as FormatError
from .core import TargetError as TargetError
from .core import ShapeError as ShapeError
from .core import DataError as DataError
from .core import TrainingError as TrainingError

# small things
from .core import data_path as data_path
from .core import set_seed as set_seed
from .core import generator as generator
from .core import generators as generators
from .core import default_device as default_device
from .core import default_dtype as default_dtype
from .core import atomic_path as atomic_path

# names of lora_diffusion, for code written for it
from .lora_diffusion import UNET_DEFAULT_TARGET_REPLACE as UNET_DEFAULT_TARGET_REPLACE
from .lora_diffusion import UNET_EXTENDED_TARGET_REPLACE as UNET_EXTENDED_TARGET_REPLACE
from .lora_diffusion import TEXT_ENCODER_DEFAULT_TARGET_REPLACE as TEXT_ENCODER_DEFAULT_TARGET_REPLACE
from .lora_diffusion import TEXT_ENCODER_EXTENDED_TARGET_REPLACE as TEXT_ENCODER_EXTENDED_TARGET_REPLACE
from .lora_diffusion import DEFAULT_TARGET_REPLACE as DEFAULT_TARGET_REPLACE
from .lora_diffusion import EMBED_FLAG as EMBED_FLAG
from .lora_diffusion import find_in_classes as find_in_classes
from .lora_diffusion import inject_trainable_lora as inject_trainable_lora
from .lora_diffusion import inject_trainable_lora_extended as inject_trainable_lora_extended
from .lora_diffusion import extract_lora_ups_down as extract_lora_ups_down
from .lora_diffusion import extract_lora_as_tensor as extract_lora_as_tensor
from .lora_diffusion import monkeypatch_or_replace_lora as monkeypatch_or_replace_lora
from .lora_diffusion import monkeypatch_or_replace_lora_extended as monkeypatch_or_replace_lora_extended
from .lora_diffusion import monkeypatch_replace_lora as monkeypatch_replace_lora
from .lora_diffusion import monkeypatch_lora as monkeypatch_lora
from .lora_diffusion import monkeypatch_add_lora as monkeypatch_add_lora
from .lora_diffusion import monkeypatch_remove_lora as monkeypatch_remove_lora
from .lora_diffusion import tune_lora_scale as tune_lora_scale
from .lora_diffusion import set_lora_diag as set_lora_diag
from .lora_diffusion import collapse_lora as collapse_lora
from .lora_diffusion import inspect_lora as inspect_lora
from .lora_diffusion import weight_apply_lora as weight_apply_lora
from .lora_diffusion import apply_learned_embed_in_clip as apply_learned_embed_in_clip
from .lora_diffusion import load_learned_embed_in_clip as load_learned_embed_in_clip
from .lora_diffusion import save_lora_weight as save_lora_weight
from .lora_diffusion import save_lora_as_json as save_lora_as_json
from .lora_diffusion import save_safeloras_with_embeds as save_safeloras_with_embeds
from .lora_diffusion import save_safeloras as save_safeloras
from .lora_diffusion import convert_loras_to_safeloras_with_embeds as convert_loras_to_safeloras_with_embeds
from .lora_diffusion import convert_loras_to_safeloras as convert_loras_to_safeloras
from .lora_diffusion import parse_safeloras as parse_safeloras
from .lora_diffusion import parse_safeloras_embeds as parse_safeloras_embeds
from .lora_diffusion import load_safeloras as load_safeloras
from .lora_diffusion import load_safeloras_embeds as load_safeloras_embeds
from .lora_diffusion import load_safeloras_both as load_safeloras_both
from .lora_diffusion import save_all as save_all
from .lora_diffusion import monkeypatch_or_replace_safeloras as monkeypatch_or_replace_safeloras
from .lora_diffusion import patch_pipe as patch_pipe
from .lora_diffusion import LoRAManager as LoRAManager
from .lora_diffusion import lora_join as lora_join
from .lora_diffusion import lora_add as lora_add
from .lora_diffusion import svd_distill as svd_distill
from .lora_diffusion import clipseg_mask_generator as clipseg_mask_generator
from .lora_diffusion import blip_captioning_dataset as blip_captioning_dataset
from .lora_diffusion import face_mask_google_mediapipe as face_mask_google_mediapipe
from .lora_diffusion import swin_ir_sr as swin_ir_sr
from .lora_diffusion import load_and_save_masks_and_captions as load_and_save_masks_and_captions

# modules
from . import __main__ as __main__
from . import architectures as architectures
from . import bases as bases
from . import captions as captions
from . import checkpoints as checkpoints
from . import cli as cli
from . import comfy as comfy
from . import composition as composition
from . import containers as containers
from . import conversion as conversion
from . import core as core
from . import dataset as dataset
from . import dataset_config as dataset_config
from . import drawing as drawing
from . import dreambooth as dreambooth
from . import evaluation as evaluation
from . import extraction as extraction
from . import families as families
from . import flow_files as flow_files
from . import flows as flows
from . import flux as flux
from . import formats as formats
from . import injection as injection
from . import kinds as kinds
from . import kohya as kohya
from . import layers as layers
from . import lessons as lessons
from . import live as live
from . import loading as loading
from . import log as log
from . import lora as lora
from . import lora_diffusion as lora_diffusion
from . import masks as masks
from . import memory as memory
from . import mixing as mixing
from . import model_card as model_card
from . import names as names
from . import optimizers as optimizers
from . import peft_files as peft_files
from . import phases as phases
from . import pictures as pictures
from . import plan as plan
from . import positional as positional
from . import preprocessing as preprocessing
from . import processes as processes
from . import products as products
from . import prompts as prompts
from . import pti as pti
from . import quantize as quantize
from . import quantized as quantized
from . import random_pipes as random_pipes
from . import recipe as recipe
from . import recipe_file as recipe_file
from . import reference as reference
from . import report as report
from . import run as run
from . import samples as samples
from . import schedule as schedule
from . import scheduling as scheduling
from . import sd3 as sd3
from . import show as show
from . import similarity as similarity
from . import states as states
from . import stopping as stopping
from . import stored as stored
from . import studio as studio
from . import textual_inversion as textual_inversion
from . import tracking as tracking
from . import training as training
from . import turbo as turbo
from . import vocabulary as vocabulary
from . import weight_cache as weight_cache
from . import words as words
from . import worn as worn
from . import zimage as zimage
from . import zoo as zoo

__all__ = ['load_base', 'as_base', 'Base', 'embedded_bases', 'random_pipe', 'estimate_memory', 'Memory', 'memory_bars', 'Lora', 'Factors', 'add_factors', 'canonical', 'block_of', 'COMPONENTS', 'STREAMS', 'BLOCKS', 'apply_lora', 'remove_lora', 'set_scale', 'extract_lora', 'adapters', 'disabled', 'inject_lora', 'find_targets', 'TARGETS', 'MMDIT_TARGETS', 'Report', 'LoraLayer', 'LoraInjectedLinear', 'LoraInjectedConv2d', 'set_scales', 'load_lora', 'save_lora', 'FORMATS', 'convert_lora', 'fit_format', 'lora_file_info', 'trigger_words', 'distill', 'distillation', 'resize', 'save_checkpoint', 'merge_checkpoint', 'compose', 'triggers_of', 'learn_weights', 'zip_columns', 'LoraSchedule', 'scheduled', 'ramp', 'interpolate', 'parse_schedule', 'parse_lora', 'lora_switch', 'LoraComposite', 'trained_schedule', 'preprocess', 'settings_for', 'find_pictures', 'open_picture', 'ConceptDataset', 'captions_of', 'recipe_card', 'recipe_for', 'Recipe', 'train_dreambooth', 'DreamBooth', 'Concept', 'load_concepts', 'class_pictures', 'train_textual_inversion', 'TextualInversion', 'inversion_recipe_for', 'neighbours', 'train_pti', 'PivotalTuning', 'pivotal_recipe_for', 'Trainer', 'Stream', 'TrainingLog', 'attention_maps', 'shift_for', 'block_groups', 'TurboRun', 'turbo_plan', 'turbo_recipe', 'turbocharged', 'with_turbo', 'turbo_settings', 'evaluate', 'Dino', 'Clip', 'diversity', 'overfitting', 'thumbnails', 'drift', 'bootstrap', 'paired_bootstrap', 'wearing', 'grid', 'before_after', 'curve', 'bars', 'heat', 'to_image', 'save_jpeg', 'Studio', 'lora_studio', 'export_live', 'serve_live', 'show_live', 'lesson_base', 'lesson_places', 'lesson_pictures', 'lesson_cost', 'at_once', 'for_diffusers', 'take_away', 'lora_ppim', 'lora_dreambooth', 'lora_ti', 'lora_pti', 'lora_generate', 'lora_evaluate', 'lora_info', 'lora_convert', 'lora_distill', 'lora_memory', 'lora_live', 'LoraError', 'FormatError', 'TargetError', 'ShapeError', 'DataError', 'TrainingError', 'data_path', 'set_seed', 'generator', 'generators', 'default_device', 'default_dtype', 'atomic_path']
