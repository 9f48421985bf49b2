//! Writes a checkpoint as a GGUF file, as llama.cpp's converter does.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use serde_json::Value as Json;

use super::config::FACTORS;
use super::names::{self, Way};
use super::{config, first_line, numbers, tokenizer};
use crate::error::{Error, Result};
use crate::model::{Config, Family, Model, Parameter, Scaling};
use crate::numbers::aligned::AlignedVec;
use crate::numbers::quantization::Quantization;

/// llama.cpp's number for a file of mostly this type, `llama_ftype`.
fn file_type(quantization: Quantization) -> u32 {
    match quantization {
        Quantization::F32 => 0,
        Quantization::F16 => 1,
        Quantization::Bf16 => 32,
        Quantization::Q8_0 => 7,
        Quantization::Q6K => 18,
        Quantization::Q4K => 14,
    }
}

/// The type of one tensor. Rows that are not whole blocks get a type with smaller blocks, as in llama.cpp.
fn tensor_type(quantization: Quantization, parameter: Parameter, shape: &[usize]) -> GgmlDType {
    let &[_, width] = shape else { return GgmlDType::F32 };
    let is_at_an_end = matches!(parameter, Parameter::EmbedTokens | Parameter::LmHead);
    let wanted = match quantization {
        Quantization::F32 => GgmlDType::F32,
        Quantization::F16 => GgmlDType::F16,
        Quantization::Bf16 => GgmlDType::BF16,
        Quantization::Q8_0 => GgmlDType::Q8_0,
        Quantization::Q6K => GgmlDType::Q6K,
        Quantization::Q4K if is_at_an_end => GgmlDType::Q6K,
        Quantization::Q4K => GgmlDType::Q4K,
    };
    let fits = |dtype: &GgmlDType| width.is_multiple_of(dtype.block_size());
    [wanted, GgmlDType::Q8_0].into_iter().find(fits).unwrap_or(GgmlDType::F16)
}

/// What the header says about a model besides its numbers.
#[derive(Debug, Clone, Default)]
pub struct About {
    /// Its name.
    pub name: String,
    /// The Hub id of the model that training began from, if it has one.
    pub base_model: Option<String>,
    /// The licence, if a model card names it.
    pub license: Option<String>,
    /// How it was made.
    pub description: String,
}

/// Files of a model directory that go into the header.
pub struct Companions<'a> {
    /// `tokenizer.json`.
    pub tokenizer: &'a Json,
    /// `tokenizer_config.json`, with the chat template.
    pub tokenizer_config: &'a Json,
    /// The token that ends a turn, and all that end a completion.
    pub ends: (u32, &'a [u32]),
}

/// Writes a model; returns it with the numbers that the file holds.
///
/// # Errors
/// [`Error::Io`] when the file cannot be written, [`Error::Model`] naming what GGUF has no entry for, [`Error::Numerics`] when a number
/// does not fit the type.
pub fn write(
    path: &Path,
    model: &Model,
    quantization: Quantization,
    about: &About,
    companions: &Companions<'_>,
) -> Result<Model> {
    let wrong = |what: String| Error::model(path, what);
    let config = model.config();
    refuse_rope(config).map_err(wrong)?;
    let mut tensors = Vec::new();
    let mut stored = model.clone();
    let list = config.stored();
    for ((layer, parameter, shape), values) in list.places().zip(stored.parameters_mut()) {
        let ordered = names::reorder(config, parameter, AlignedVec::from(&*values), Way::ToFile);
        let dtype = tensor_type(quantization, parameter, shape);
        let tensor = quantize(&ordered, shape, dtype).map_err(|err| wrong(first_line(&err)))?;
        let back = tensor
            .dequantize(&Device::Cpu)
            .and_then(|tensor| numbers(&tensor))
            .map(|numbers| AlignedVec::from(&numbers[..]))
            .map_err(|err| wrong(first_line(&err)))?;
        let name = names::stored(layer, parameter);
        if let Some(value) = back.iter().find(|value| !value.is_finite()) {
            return Err(Error::Numerics(format!("{name} has a {value} in {}", quantization.name())));
        }
        values.copy_from_slice(&names::reorder(config, parameter, back, Way::FromFile));
        tensors.push((name, tensor));
    }
    if let Some(factors) = rope_factors(model) {
        let tensor = quantize(&factors, &[factors.len()], GgmlDType::F32).map_err(|err| wrong(first_line(&err)))?;
        tensors.push((FACTORS.into(), tensor));
    }
    let header = header(config, quantization, about, companions).map_err(wrong)?;
    let header: Vec<(&str, &Value)> = header.iter().map(|(name, value)| (name.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = BufWriter::new(File::create(path).map_err(Error::io(path))?);
    gguf_file::write(&mut file, &header, &tensors).map_err(|err| wrong(first_line(&err)))?;
    file.flush().and_then(|()| file.get_ref().sync_all()).map_err(Error::io(path))?;
    Ok(stored)
}

fn quantize(numbers: &[f32], shape: &[usize], dtype: GgmlDType) -> candle_core::Result<QTensor> {
    QTensor::quantize(&Tensor::from_slice(numbers, shape, &Device::Cpu)?, dtype)
}

fn header(
    config: &Config,
    quantization: Quantization,
    about: &About,
    companions: &Companions<'_>,
) -> std::result::Result<Vec<(String, Value)>, String> {
    let arch = match config.family {
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
        Family::Llama | Family::Mistral => "llama",
    };
    let text = |key: &str, text: &str| (format!("general.{key}"), Value::String(text.into()));
    let mut entries = vec![text("architecture", arch), text("type", "model"), text("name", &about.name)];
    entries.push(text("description", &about.description));
    entries.extend(about.license.as_deref().map(|license| text("license", license)));
    if let Some(id) = &about.base_model {
        let (owner, name) = id.split_once('/').unwrap_or(("", id));
        entries.push(("general.base_model.count".into(), Value::U32(1)));
        entries.push(text("base_model.0.name", name));
        entries.push(text("base_model.0.organization", owner));
        entries.push(text("base_model.0.repo_url", &format!("https://huggingface.co/{id}")));
    }
    entries.extend(config::entries(config, arch));
    entries.push(("general.file_type".into(), Value::U32(file_type(quantization))));
    entries.push(("general.quantization_version".into(), Value::U32(2)));
    let files = [companions.tokenizer, companions.tokenizer_config];
    entries.extend(tokenizer::entries(files, config.vocab_size, companions.ends)?);
    Ok(entries)
}

/// Refuses ropes that llama.cpp computes otherwise.
fn refuse_rope(config: &Config) -> std::result::Result<(), String> {
    let Scaling::Yarn(yarn) = &config.rope.scaling else { return Ok(()) };
    let usual = (yarn.attention_factor - (0.1 * yarn.factor.max(1.0).ln() + 1.0)).abs() < 1e-6;
    match usual && (yarn.beta_fast, yarn.beta_slow, yarn.truncate) == (32.0, 1.0, true) {
        true => Ok(()),
        false => Err("GGUF has YaRN's factor only, not its attention factor, betas or truncation".into()),
    }
}

/// The divisors of the rope's frequencies where they are no scaling that the header can name.
fn rope_factors(model: &Model) -> Option<Vec<f32>> {
    let rope = &model.config().rope;
    match &rope.scaling {
        Scaling::Llama3(llama3) => Some(llama3.factors(rope.rope_theta, model.config().head_dim())),
        Scaling::Factors(factors) => Some(factors.clone()),
        _ => None,
    }
}
