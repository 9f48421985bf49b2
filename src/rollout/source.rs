//! What is sampled from: a model directory, or a GGUF file.

use std::path::{Path, PathBuf};
#[cfg(feature = "candle")]
use std::sync::Arc;

use crate::checkpoint::{self, Identity};
#[cfg(feature = "candle")]
use crate::directory::model_type;
#[cfg(feature = "candle")]
use crate::engine::Teacher;
#[cfg(not(feature = "candle"))]
use crate::error::Error;
use crate::error::Result;
#[cfg(feature = "candle")]
use crate::gguf::Gguf;
use crate::gpu::device::ComputeDevice;
use crate::model::{Config, Model};
use crate::numbers::dtype::Dtype;
use crate::tokenizer::{TemplateArgs, Tokenizer, stop_ids};

/// A model to sample from. If the engine runs it, its weights are not loaded yet.
pub struct Source {
    files: Files,
    /// The model as candle runs it, if the engine does not have its architecture.
    #[cfg(feature = "candle")]
    pub teacher: Option<Arc<Teacher>>,
}

enum Files {
    /// As transformers saves a model.
    Directory(PathBuf),
    /// A file of llama.cpp's format.
    #[cfg(feature = "candle")]
    Gguf(Gguf),
}

/// What sequences must fit.
pub struct Limits {
    /// The longest sequence (tokens).
    pub positions: usize,
    /// The size of the vocabulary.
    pub vocabulary: usize,
}

impl Source {
    /// The `model_type`s of model directories that can be sampled from besides those that the engine runs.
    #[cfg(feature = "candle")]
    pub fn other_types() -> Vec<&'static str> {
        Teacher::names()[0].clone()
    }

    /// Without candle there are none.
    #[cfg(not(feature = "candle"))]
    pub fn other_types() -> Vec<&'static str> {
        Vec::new()
    }

    /// A model directory, or a GGUF file. What candle runs is loaded to `device`.
    ///
    /// # Errors
    /// [`crate::Error::Model`] for a file of another kind, and those of [`crate::engine::Teacher`].
    #[cfg(feature = "candle")]
    pub fn open(path: &Path, device: &ComputeDevice) -> Result<Self> {
        if path.is_file() {
            let file = Gguf::open(path)?;
            let teacher = if file.is_of_the_engine() { None } else { Some(Arc::new(Teacher::of_gguf(&file, device)?)) };
            return Ok(Self { files: Files::Gguf(file), teacher });
        }
        let teacher =
            if Teacher::has(&model_type(path)) { Some(Arc::new(Teacher::of_directory(path, device)?)) } else { None };
        Ok(Self { files: Files::Directory(path.into()), teacher })
    }

    /// A model directory.
    ///
    /// # Errors
    /// [`Error::Model`] for a file.
    #[cfg(not(feature = "candle"))]
    pub fn open(path: &Path, _: &ComputeDevice) -> Result<Self> {
        match path.is_file() {
            true => Err(Error::model(
                path,
                "this build lacks the feature candle, which reads GGUF; `cargo build --release` has it",
            )),
            false => Ok(Self { files: Files::Directory(path.into()) }),
        }
    }

    /// The directory of the model, or that of the file, where there may be a `tokenizer.json` and a `system_prompt.txt`.
    pub fn dir(&self) -> &Path {
        match &self.files {
            Files::Directory(dir) => dir,
            #[cfg(feature = "candle")]
            Files::Gguf(file) => match file.path().parent() {
                Some(dir) if dir != Path::new("") => dir,
                _ => Path::new("."),
            },
        }
    }

    /// What sequences must fit.
    ///
    /// # Errors
    /// [`crate::Error::Model`] when the model is not supported, or damaged.
    pub fn limits(&self) -> Result<Limits> {
        #[cfg(feature = "candle")]
        if let Some(teacher) = &self.teacher {
            return Ok(Limits { positions: teacher.positions, vocabulary: teacher.vocabulary });
        }
        let config = match &self.files {
            Files::Directory(dir) => Config::load(dir)?,
            #[cfg(feature = "candle")]
            Files::Gguf(file) => file.config()?,
        };
        Ok(Limits { positions: config.positions(), vocabulary: config.vocab_size })
    }

    /// Whether its matrices are stored in fewer than 16 bits.
    pub fn is_quantized(&self) -> bool {
        match &self.files {
            Files::Directory(_) => false,
            #[cfg(feature = "candle")]
            Files::Gguf(file) => file.is_quantized(),
        }
    }

    /// The weights in f32 or bf16, for the engine.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when they cannot be read, [`crate::Error::Model`] when they do not fit the shape.
    pub fn load(&self, dtype: Dtype) -> Result<Model> {
        match &self.files {
            Files::Directory(dir) => Model::load_as(dir, dtype),
            #[cfg(feature = "candle")]
            Files::Gguf(file) => file.load(dtype),
        }
    }

    /// Identifies the weights.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when they cannot be read, [`crate::Error::Model`] when there are none.
    pub fn identity(&self) -> Result<Identity> {
        match &self.files {
            Files::Directory(dir) => checkpoint::identity(dir),
            #[cfg(feature = "candle")]
            Files::Gguf(file) => checkpoint::identity_of_file(file.path()),
        }
    }

    /// The tokenizer: for a GGUF file that beside it, else its own.
    ///
    /// # Errors
    /// Those of [`Tokenizer::load`].
    pub fn tokenizer(&self, template: &TemplateArgs) -> Result<Tokenizer> {
        match &self.files {
            #[cfg(feature = "candle")]
            Files::Gguf(file) if !self.dir().join("tokenizer.json").is_file() => {
                Tokenizer::of_json(file.path(), file.tokenizer()?, template)
            }
            _ => Tokenizer::with_template(self.dir(), template),
        }
    }

    /// The tokens that end a completion.
    ///
    /// # Errors
    /// [`crate::Error::Model`] when there are none.
    pub fn stop_ids(&self) -> Result<Vec<u32>> {
        match &self.files {
            Files::Directory(dir) => stop_ids(dir),
            #[cfg(feature = "candle")]
            Files::Gguf(file) => file.stop_ids(),
        }
    }
}
