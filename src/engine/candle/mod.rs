//! Decodes with the models of candle: architectures that the engine does not have, for sampling alone.
//!
//! A model of candle holds the keys and values of the sequence that it runs, so each sequence has a model of its own. All of them share
//! the weights.

mod architectures;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::Settings;
use super::decoder::{Decoder, Drawn, Prefill};
use super::sampler::Sampler;
use super::scheduler::Start;
use crate::directory::{self, CONFIG};
use crate::error::{Error, Result};
use crate::gguf::{Gguf, first_line};
use crate::gpu::device::ComputeDevice;
use crate::model::Sampling;
use crate::numbers::rng::Stream;
use architectures::{DIRECTORIES, FILES, NewSequence, Sequence};

type Outcome<T> = candle_core::Result<T>;

/// A model of candle.
pub struct Teacher {
    new_sequence: NewSequence,
    device: Device,
    token_by_token: bool,
    /// The longest sequence (tokens).
    pub positions: usize,
    /// V.
    pub vocabulary: usize,
}

impl Teacher {
    /// Whether candle has the architecture of a `config.json` with this `model_type`.
    #[must_use]
    pub fn has(model_type: &str) -> bool {
        DIRECTORIES.iter().any(|one| one.model_type == model_type)
    }

    /// The names of what it has, in directories and in GGUF files.
    #[must_use]
    pub fn names() -> [Vec<&'static str>; 2] {
        [DIRECTORIES.iter().map(|one| one.model_type).collect(), FILES.iter().map(|(name, _)| *name).collect()]
    }

    /// Loads a model directory.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read, [`Error::Model`] when candle does not take the config or the weights,
    /// [`Error::Device`] when it cannot use the GPU.
    pub fn of_directory(dir: &Path, device: &ComputeDevice) -> Result<Self> {
        if directory::base_of(dir)?.is_some() {
            return Err(Error::model(
                dir,
                "an adapter of a model that is not of the engine's families: merge it with PEFT",
            ));
        }
        let path = dir.join(CONFIG);
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let mut config: Map<String, Value> =
            serde_json::from_str(&text).map_err(|err| Error::model(&path, err.to_string()))?;
        let kind = config.get("model_type").and_then(Value::as_str).unwrap_or_default().to_owned();
        let architecture = DIRECTORIES.iter().find(|one| one.model_type == kind).ok_or_else(|| {
            Error::model(&path, format!("model_type \"{kind}\" is not one of {}", Self::names()[0].join(", ")))
        })?;
        spell_as_before(&mut config).map_err(|what| Error::model(&path, what))?;
        let granted = architecture.granted.iter().chain(&[("rope_scaling", false), ("quantization_config", false)]);
        for (name, is_true) in granted {
            let value = config.get(*name).unwrap_or(&Value::Null);
            let fits = if *is_true { matches!(value, Value::Null | Value::Bool(true)) } else { is_nothing(value) };
            if !fits {
                let what = format!("{name} = {value} is not supported for model_type \"{kind}\"");
                return Err(Error::model(&path, what));
            }
        }
        if !layers_are_in_turn(&config) {
            return Err(Error::model(&path, "layer_types that do not follow sliding_window_pattern are not supported"));
        }
        let sizes = ["max_position_embeddings", "vocab_size"].map(|name| {
            let size = config.get(name).and_then(Value::as_u64).and_then(|size| usize::try_from(size).ok());
            size.filter(|size| *size > 0).ok_or_else(|| Error::model(&path, format!("no {name}")))
        });
        let [positions, vocabulary] = sizes;
        let positions = positions.map(|positions| positions.min(exact_within(&kind, &config)));
        let device = device_of_candle(device)?;
        let mut tensors = HashMap::new();
        for file in directory::weight_files(dir)? {
            let read = candle_core::safetensors::load(&file, &device);
            for (name, tensor) in read.map_err(|err| Error::model(&file, first_line(&err)))? {
                let tensor = tensor.to_dtype(DType::F32).map_err(|err| Error::model(&file, first_line(&err)))?;
                tensors.insert(name, tensor);
            }
        }
        let weights = VarBuilder::from_tensors(tensors, DType::F32, &device);
        let new_sequence = (architecture.read)(&Value::Object(config), weights);
        let new_sequence = new_sequence.map_err(|err| Error::model(&path, first_line(&err)))?;
        let token_by_token = architecture.token_by_token;
        Self { new_sequence, device, token_by_token, positions: positions?, vocabulary: vocabulary? }.checked(dir)
    }

    /// Whether candle has the architecture of a GGUF file.
    #[must_use]
    pub fn has_file_of(architecture: &str) -> bool {
        FILES.iter().any(|(name, _)| *name == architecture)
    }

    /// Loads a GGUF file.
    ///
    /// # Errors
    /// As [`Teacher::of_directory`].
    pub fn of_gguf(file: &Gguf, device: &ComputeDevice) -> Result<Self> {
        let path = file.path();
        let read = FILES.iter().find(|(name, _)| *name == file.architecture()).map(|(_, read)| read);
        let read = read.ok_or_else(|| {
            let known = Self::names()[1].join(", ");
            Error::model(path, format!("architecture \"{}\" is not one of {known}", file.architecture()))
        })?;
        let device = device_of_candle(device)?;
        let new_sequence = read(path, &device).map_err(|err| Error::model(path, first_line(&err)))?;
        // What candle's Phi-3 takes for granted.
        let theta = file.number("phi3.rope.freq_base").unwrap_or(10_000.0);
        if theta != 10_000.0 || file.has_tensor("rope_factors_long.weight") {
            return Err(Error::model(path, "a rope that is not Phi-3's plain one is not supported"));
        }
        let window = file.number("phi3.attention.sliding_window").map_or(usize::MAX, |window| window as usize);
        let (positions, vocabulary) = (file.positions()?.min(window), file.vocabulary()?);
        Self { new_sequence, device, token_by_token: false, positions, vocabulary }.checked(path)
    }

    /// Whether it computes on a GPU.
    #[must_use]
    pub fn is_on_gpu(&self) -> bool {
        !self.device.is_cpu()
    }

    /// Makes one sequence, to find what is wrong with the weights before sampling begins.
    fn checked(self, path: &Path) -> Result<Self> {
        (self.new_sequence)().map_err(|err| Error::model(path, first_line(&err)))?;
        Ok(self)
    }
}

/// Where candle computes: on the GPU if this build has candle's kernels.
#[cfg(feature = "candle-cuda")]
fn device_of_candle(chosen: &ComputeDevice) -> Result<Device> {
    if chosen.gpu.is_none() {
        return Ok(Device::Cpu);
    }
    Device::new_cuda(chosen.ordinal).map_err(|err| Error::Device(first_line(&err)))
}

#[cfg(not(feature = "candle-cuda"))]
fn device_of_candle(chosen: &ComputeDevice) -> Result<Device> {
    if chosen.is_named && chosen.gpu.is_some() {
        let what = "--device: candle runs this model, in this build on the CPU alone; --features candle-cuda has its kernels for GPUs";
        return Err(Error::Usage(what.into()));
    }
    Ok(Device::Cpu)
}

/// Gives a config of transformers 5 the entries of version 4, which candle reads.
fn spell_as_before(config: &mut Map<String, Value>) -> std::result::Result<(), String> {
    for (new, old) in [("num_local_experts", "num_experts"), ("_sliding_window_pattern", "sliding_window_pattern")] {
        if let Some(value) = config.get(new).cloned() {
            config.entry(old).or_insert(value);
        }
    }
    if config.get("use_sliding_window") == Some(&Value::Bool(false)) {
        let all = config.get("max_position_embeddings").cloned().unwrap_or_default();
        config.insert("sliding_window".into(), all); // candle looks at the window alone
        config.entry("max_window_layers").or_insert(0.into());
    }
    let Some(Value::Object(rope)) = config.shift_remove("rope_parameters") else { return Ok(()) };
    let layers = ["full_attention", "sliding_attention"].map(|kind| rope.get(kind).and_then(Value::as_object));
    let ropes = match layers {
        [Some(full), Some(sliding)] => vec![("rope_theta", full), ("rope_local_base_freq", sliding)],
        _ => vec![("rope_theta", &rope)],
    };
    for (name, rope) in ropes {
        if let Some(kind) = rope.get("rope_type").filter(|kind| *kind != "default") {
            return Err(format!("rope type {kind} is not supported for this model_type"));
        }
        for (entry, value) in rope.iter().filter(|(entry, _)| *entry != "rope_type") {
            let name = if entry == "rope_theta" { name } else { entry };
            config.insert(name.into(), value.clone());
        }
    }
    Ok(())
}

/// Whether the layers with a window are those that candle takes for them: all but every `sliding_window_pattern`th.
fn layers_are_in_turn(config: &Map<String, Value>) -> bool {
    let pattern = config.get("sliding_window_pattern").and_then(Value::as_u64).filter(|pattern| *pattern > 0);
    let (Some(pattern), Some(Value::Array(kinds))) = (pattern, config.get("layer_types")) else { return true };
    (1..).zip(kinds).all(|(layer, kind): (u64, _)| (kind == "full_attention") == layer.is_multiple_of(pattern))
}

/// How far candle's attention is that of transformers (tokens): but for Gemma 3, it gives all layers the same window, or none a window.
fn exact_within(kind: &str, config: &Map<String, Value>) -> usize {
    let window = config.get("sliding_window").and_then(Value::as_u64).filter(|_| kind != "gemma3_text");
    window.and_then(|window| usize::try_from(window).ok()).unwrap_or(usize::MAX)
}

fn is_nothing(value: &Value) -> bool {
    matches!(value, Value::Null | Value::Bool(false)) || value.as_array().is_some_and(Vec::is_empty)
}

/// A prompt, and the draws of its samples.
struct Prompt {
    tokens: Vec<u32>,
    stream: Stream,
    sampling: Sampling,
}

struct Running {
    model: Box<dyn Sequence>,
    sample: usize,
    prompt: Arc<Prompt>,
    tokens: Vec<u32>,
}

/// Runs a teacher's sequences side by side.
pub struct CandleDecoder<'t> {
    teacher: &'t Teacher,
    prompts: HashMap<usize, Arc<Prompt>>,
    slots: Vec<Option<Running>>,
}

impl<'t> CandleDecoder<'t> {
    /// Makes empty slots for the sequences of `settings`.
    #[must_use]
    pub fn new(teacher: &'t Teacher, settings: &Settings) -> Self {
        let slots = (0..settings.max_sequences).map(|_| None).collect();
        Self { teacher, prompts: HashMap::new(), slots }
    }

    /// Runs the sequences that `due` selects up to their last token, and draws one more for each.
    fn draw(&mut self, due: impl Fn(&Running) -> bool + Sync, drawn: &mut Vec<Drawn>) -> Result<()> {
        let teacher = self.teacher;
        // A GPU's work has one order, whichever thread hands it over.
        let in_turn = if self.teacher.device.is_cpu() { 1 } else { self.slots.len() };
        let running = self
            .slots
            .par_iter_mut()
            .with_min_len(in_turn)
            .enumerate()
            .filter_map(|(i, slot)| Some((i, slot.as_mut()?)));
        let all: Vec<Outcome<Drawn>> = running
            .filter(|(_, running)| due(running))
            .map_init(Sampler::default, |sampler, (slot, running)| {
                Ok(Drawn { slot, drawn: running.draw(sampler, teacher)? })
            })
            .collect();
        for one in all {
            drawn.push(one.map_err(|err| Error::Device(first_line(&err)))?);
        }
        Ok(())
    }
}

impl Running {
    /// Runs what the model has not seen yet, and draws the next token.
    fn draw(&mut self, sampler: &mut Sampler, teacher: &Teacher) -> Outcome<Option<(u32, f32)>> {
        let prompt = &self.prompt.tokens;
        let (next, mut position) = match self.tokens.last() {
            None => (&prompt[..], 0),
            Some(last) => (std::slice::from_ref(last), prompt.len() + self.tokens.len() - 1),
        };
        let (mut logits, together) = (None, if teacher.token_by_token { 1 } else { next.len() });
        for tokens in next.chunks(together) {
            let tokens = Tensor::new(tokens, &teacher.device)?.unsqueeze(0)?;
            logits = Some(self.model.forward(&tokens, position)?);
            position += together;
        }
        let logits = logits.expect("at least one token").to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let uniform = self.prompt.stream.uniform(self.sample as u64, self.tokens.len() as u64);
        let drawn = sampler.draw(&logits, [prompt, &self.tokens], uniform, &self.prompt.sampling);
        self.tokens.extend(drawn.map(|(token, _)| token));
        Ok(drawn)
    }
}

impl Decoder for CandleDecoder<'_> {
    /// Only remembers prompts: each sequence runs its own.
    fn prefill(&mut self, prompts: &[Prefill<'_>]) -> Result<()> {
        for prompt in prompts {
            let kept = Prompt { tokens: prompt.tokens.to_vec(), stream: prompt.stream, sampling: prompt.sampling };
            self.prompts.insert(prompt.group, Arc::new(kept));
        }
        Ok(())
    }

    fn begin(&mut self, starts: &[Start], drawn: &mut Vec<Drawn>) -> Result<()> {
        for start in starts {
            let model = (self.teacher.new_sequence)().map_err(|err| Error::Device(first_line(&err)))?;
            let prompt = Arc::clone(&self.prompts[&start.group]);
            self.slots[start.slot] = Some(Running { model, sample: start.sample, prompt, tokens: Vec::new() });
        }
        self.draw(|running| running.tokens.is_empty(), drawn)
    }

    fn step(&mut self, drawn: &mut Vec<Drawn>) -> Result<()> {
        self.draw(|_| true, drawn)
    }

    fn end(&mut self, slot: usize) {
        self.slots[slot] = None;
    }

    fn forget(&mut self, group: usize) {
        self.prompts.remove(&group);
    }

    /// candle does not show what layers compute.
    fn first_not_finite(&mut self, _: &[u32]) -> Result<Option<usize>> {
        Ok(None)
    }
}
