//! Exports a checkpoint as a Hugging Face model directory, a zip file of it, a GGUF file, or an adapter.

pub mod adapter;
mod card;
mod check;
#[cfg(feature = "candle")]
pub mod gguf;
mod recipe;
pub mod rollouts;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::checkpoint::{self, Publication};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::numbers::dtype::Dtype;

pub use card::Card;

/// Writes the model in `checkpoint` as a directory that appears as `target` when it is complete.
///
/// # Errors
/// [`Error::Usage`] when `target` exists, [`Error::Io`] or [`Error::Model`] when the checkpoint cannot be read or the directory not
/// be written, [`Error::Numerics`] when a weight is not finite in `dtype`, or the files read back do not answer as the checkpoint does.
pub fn directory(checkpoint: &Path, target: &Path, dtype: Dtype, card: &Card) -> Result<()> {
    let publication = Publication::begin(target)?;
    fill(checkpoint, publication.dir(), dtype, card)?;
    publication.publish()
}

/// Writes the same files, under a folder of the archive's own name, as a zip file.
///
/// # Errors
/// As [`directory`].
pub fn archive(checkpoint: &Path, target: &Path, dtype: Dtype, card: &Card) -> Result<()> {
    checkpoint::refuse_existing(target)?;
    let folder = target.file_stem().filter(|stem| ![".", ".."].map(OsStr::new).contains(stem)); // `..zip` and `...zip`
    let folder = folder.ok_or_else(|| Error::Usage(format!("{}: not a name", target.display())))?;
    let publication = Publication::begin(&target.with_extension("unzipped"))?;
    let files = publication.dir().join(folder);
    fs::create_dir(&files).map_err(Error::io(&files))?;
    fill(checkpoint, &files, dtype, card)?;
    let zipped = publication.dir().join("zip");
    pack(&files, &folder.to_string_lossy(), &zipped).map_err(Error::io(target))?;
    checkpoint::refuse_existing(target)?;
    fs::rename(&zipped, target).map_err(Error::io(target))
}

fn fill(checkpoint: &Path, dir: &Path, dtype: Dtype, card: &Card) -> Result<()> {
    let mut model = Model::load(checkpoint)?;
    checkpoint::copy_companions(checkpoint, dir, dtype.torch_name())?;
    refuse_not_finite(checkpoint, &model, |value| dtype.holds(value), dtype.torch_name())?;
    let path = dir.join(checkpoint::WEIGHTS);
    model.save(&path, dtype)?;
    if dtype != Dtype::F32 {
        model.parameters_mut().into_iter().flatten().for_each(|value| *value = dtype.rounded(*value));
    }
    check::same_answers(&path, &Model::load(dir)?, &model)?;
    let path = dir.join("README.md");
    fs::write(&path, card.render("transformers", dtype.torch_name())).map_err(Error::io(&path))
}

/// Refuses weights that `fits` refuses.
fn refuse_not_finite(checkpoint: &Path, model: &Model, fits: impl Fn(f32) -> bool, dtype: &str) -> Result<()> {
    for ((name, _), values) in model.config().stored().named().iter().zip(model.parameters()) {
        if let Some(value) = values.iter().find(|value| !fits(**value)) {
            let place = checkpoint.display();
            return Err(Error::Numerics(format!("{place}: {name} has a {value}, not in {dtype}")));
        }
    }
    Ok(())
}

/// Packs files without compression, because weights hardly shrink. Entries are sorted by name and have no time, so that the bytes are
/// the same each time.
fn pack(files: &Path, folder: &str, target: &Path) -> io::Result<()> {
    let mut names = fs::read_dir(files)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
    names.sort();
    let mut zip = ZipWriter::new(File::create(target)?);
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(true);
    for name in names {
        zip.start_file(format!("{folder}/{}", name.to_string_lossy()), options)?;
        io::copy(&mut File::open(files.join(name))?, &mut zip)?;
    }
    let mut file = zip.finish()?;
    file.flush()?;
    file.sync_all()
}
