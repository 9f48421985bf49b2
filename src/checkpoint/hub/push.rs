//! Uploads files to a repository on the Hub, as one commit.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use serde_json::json;

use super::api::{Fault, RepoKind};
use super::lfs::LfsFile;
use super::upload::{Branch, Mode, SAMPLE};
use super::{Hub, is_object_id, is_set, split_id};
use crate::checkpoint::entries;
use crate::error::{Error, Result};
use crate::process::message::one_line;

/// Files in one question to the Hub, and in one of its answers with addresses to upload to.
const FILES_AT_ONCE: usize = 100;

/// Who may see a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Visibility {
    /// The owner, or the organisation's members
    Private,
    /// Everybody
    Public,
}

impl Visibility {
    fn name(self) -> &'static str {
        match self {
            Self::Private => "private",
            Self::Public => "public",
        }
    }
}

/// How to push to a repository on the Hub.
#[derive(Debug, clap::Args)]
pub struct PushArgs {
    /// Upload the export to this repository on the Hub, OWNER/NAME, instead of writing OUT. HF_TOKEN must be a token that may write
    #[arg(long, value_name = "ID", group = "hub", conflicts_with_all = ["out", "zip"])]
    pub push: Option<String>,
    /// Upload records to this data set on the Hub, OWNER/NAME. CHECKPOINT is then a file of JSONL records, a directory of such files, as
    /// a run's rollouts/ is, or a data set that `make data` made
    #[arg(long, value_name = "ID", group = "hub", conflicts_with_all = ["out", "zip", "gguf", "dtype", "metrics", "evaluation"])]
    pub push_dataset: Option<String>,
    /// Make the repository, and the branch of --revision, if there is none
    #[arg(long, value_name = "VISIBILITY", requires = "hub")]
    pub create: Option<Visibility>,
    /// Branch to commit to [default: main]
    #[arg(long, value_name = "BRANCH", requires = "hub")]
    pub revision: Option<String>,
    /// Message of the commit [default: Upload NAME with export-hf]
    #[arg(long, value_name = "TEXT", requires = "hub")]
    pub message: Option<String>,
    /// Print what would be uploaded, and where, and ask the Hub nothing
    #[arg(long, requires = "hub")]
    pub dry_run: bool,
}

/// A file to upload.
#[derive(Debug)]
pub struct PushFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its name in the repository.
    pub name: String,
}

impl PushFile {
    /// The files of a directory, by name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn all_in(dir: &Path) -> Result<Vec<Self>> {
        let mut paths = entries(dir)?;
        paths.sort();
        let named = |path: PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Self { path, name }
        };
        Ok(paths.into_iter().map(named).collect())
    }
}

/// A repository that files are pushed to.
pub struct Push<'a> {
    hub: Hub,
    args: &'a PushArgs,
}

/// A file with what the Hub says of it.
struct Planned<'a> {
    file: &'a PushFile,
    size: u64,
    mode: Mode,
}

impl<'a> Push<'a> {
    /// Prepares a push of `kind` to the repository `id`.
    ///
    /// # Errors
    /// [`Error::Usage`] when `id` is no id or the branch no name, [`Error::Hub`] when there is no token or the Hub is not to be asked.
    pub fn new(kind: RepoKind, id: &str, args: &'a PushArgs) -> Result<Self> {
        split_id(id).ok_or_else(|| Error::Usage(format!("{id}: not a Hub id owner/name")))?;
        let hub = Hub::from_environment(kind, id.into())?;
        let push = Self { hub, args };
        if push.branch().name.is_empty() || push.branch().name.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(Error::Usage(format!("--revision {:?}: not a branch", push.branch().name)));
        }
        match args.dry_run {
            false if is_set("HF_HUB_OFFLINE") => Err(push.hub.error("HF_HUB_OFFLINE is set")),
            false if push.hub.api.token.is_none() => {
                Err(push.hub.error("set HF_TOKEN to a token that may write to it"))
            }
            _ => Ok(push),
        }
    }

    /// Uploads the files in one commit, and returns the lines that tell of it. `say` gets what happens meanwhile.
    ///
    /// # Errors
    /// [`Error::Hub`] when the Hub refuses or cannot be reached, [`Error::Io`] when a file cannot be read.
    pub fn files(&self, files: &[PushFile], say: &dyn Fn(&str)) -> Result<Vec<String>> {
        if self.args.dry_run {
            return self.plan(files);
        }
        self.create(say)?;
        let mut planned = Vec::new();
        for files in files.chunks(FILES_AT_ONCE) {
            planned.extend(self.ask(files)?);
        }
        for one in planned.extract_if(.., |one| one.mode.should_ignore) {
            say(&format!("{}: left out, as the repository's .gitignore says", one.file.name));
        }
        let mut lines = vec![self.header()];
        let mut large = Vec::new();
        for one in &planned {
            if one.is_large() {
                large.push(self.lfs_file(one)?);
            } else if let Some(line) = one.regular_line()? {
                lines.push(line);
            }
        }
        for files in large.chunks(FILES_AT_ONCE) {
            self.hub.api.upload(&self.branch(), files, say).map_err(|fault| self.explained(fault))?;
        }
        let is_new = |file: &&LfsFile<'_>| {
            let there = planned.iter().find(|one| one.file.name == file.name).and_then(|one| one.mode.oid.as_ref());
            there != Some(&file.oid)
        };
        lines.extend(large.iter().filter(is_new).map(lfs_line));
        if lines.len() == 1 {
            say("nothing has changed since the last commit");
            return Ok(vec![self.address("tree", self.branch().name)]);
        }
        let commit = self.hub.api.commit_lines(&self.branch(), (lines.join("\n") + "\n").as_bytes());
        let commit = commit.map_err(|fault| self.explained(fault))?;
        match is_object_id(&commit) {
            true => Ok(vec![self.address("commit", &commit)]),
            false => Err(self.hub.error(format!("bad commit {commit:?}"))),
        }
    }

    /// What would be uploaded, and where.
    fn plan(&self, files: &[PushFile]) -> Result<Vec<String>> {
        let create = self.args.create.map_or("which must exist", |visibility| match visibility {
            Visibility::Private => "made private if there is none",
            Visibility::Public => "made public if there is none",
        });
        let mut lines = vec![format!("{}, {create}", self.address("tree", self.branch().name))];
        for file in files {
            let size = std::fs::metadata(&file.path).map_err(Error::io(&file.path))?.len();
            lines.push(format!("{size:>14}  {}", file.name));
        }
        Ok(lines)
    }

    fn create(&self, say: &dyn Fn(&str)) -> Result<()> {
        let Some(visibility) = self.args.create else { return Ok(()) };
        let (api, id) = (&self.hub.api, &self.hub.id);
        let made = api.create(self.hub.kind, id, visibility.name()).map_err(|fault| self.explained(fault))?;
        say(&match made {
            true => format!("made {id}, {}", visibility.name()),
            false => format!("{id} is there already"),
        });
        if self.branch().name != "main" {
            api.create_branch(&self.branch()).map_err(|fault| self.explained(fault))?;
        }
        Ok(())
    }

    /// Asks the Hub how files are to be uploaded.
    fn ask<'f>(&self, files: &'f [PushFile]) -> Result<Vec<Planned<'f>>> {
        let mut described = Vec::new();
        for file in files {
            let opened = File::open(&file.path).map_err(Error::io(&file.path))?;
            let size = opened.metadata().map_err(Error::io(&file.path))?.len();
            let mut sample = Vec::new();
            opened.take(SAMPLE as u64).read_to_end(&mut sample).map_err(Error::io(&file.path))?;
            described.push((file.name.as_str(), BASE64_STANDARD.encode(sample), size));
        }
        let modes = self.hub.api.upload_modes(&self.branch(), &described).map_err(|fault| self.explained(fault))?;
        let mut modes: Vec<Option<Mode>> = modes.into_iter().map(Some).collect();
        let plan = |(file, (_, _, size)): (&'f PushFile, &(&str, String, u64))| {
            let mode = modes.iter_mut().find_map(|mode| mode.take_if(|mode| mode.path == file.name));
            let mode = mode.ok_or_else(|| self.hub.error(format!("says nothing of {}", file.name)))?;
            Ok(Planned { file, size: *size, mode })
        };
        files.iter().zip(&described).map(plan).collect()
    }

    fn lfs_file<'f>(&self, one: &Planned<'f>) -> Result<LfsFile<'f>> {
        let path = &one.file.path;
        let mut hash = Context::new(&SHA256);
        let mut file = File::open(path).map_err(Error::io(path))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer).map_err(Error::io(path))? {
                0 => break,
                read => hash.update(&buffer[..read]),
            }
        }
        Ok(LfsFile { path, name: &one.file.name, oid: hex(hash), size: one.size })
    }

    fn header(&self) -> String {
        let (_, name) = split_id(&self.hub.id).expect("checked when it was made");
        let summary = self.args.message.clone().unwrap_or_else(|| format!("Upload {name} with export-hf"));
        json!({"key": "header", "value": {"summary": summary, "description": ""}}).to_string()
    }

    fn branch(&self) -> Branch<'_> {
        Branch { kind: self.hub.kind, id: &self.hub.id, name: self.args.revision.as_deref().unwrap_or("main") }
    }

    /// The address of a commit or a branch in a browser.
    fn address(&self, what: &str, name: &str) -> String {
        let hub = &self.hub;
        format!("{}/{}{}/{what}/{name}", hub.api.endpoint(), hub.kind.prefix(), hub.id)
    }

    fn explained(&self, fault: Fault) -> Error {
        let (id, branch) = (&self.hub.id, self.branch().name);
        let because = |words: String| if words.is_empty() { words } else { format!(" ({})", one_line(&words)) };
        self.hub.error(match fault {
            Fault::Refused(401, words) => {
                format!("the token is not valid: set HF_TOKEN to a token that may write to {id}{}", because(words))
            }
            Fault::Refused(403, words) => format!("HF_TOKEN may not write to {id}{}", because(words)),
            Fault::Refused(404, _) => {
                format!("there is no such repository, or no branch {branch}: --create private makes it")
            }
            Fault::Refused(status, words) => {
                format!("{} refuses it with status {status}{}", self.hub.api.endpoint(), because(words))
            }
            Fault::Unreachable(cause) => {
                let cause = one_line(&cause);
                format!("cannot reach {}: {cause}; the same command goes on from there", self.hub.api.endpoint())
            }
            Fault::Status(status) => {
                format!("{} answers with status {status}; try again later", self.hub.api.endpoint())
            }
            fault => self.hub.explain(&fault),
        })
    }
}

impl Planned<'_> {
    /// LFS has no empty objects.
    fn is_large(&self) -> bool {
        self.mode.upload_mode == "lfs" && self.size > 0
    }

    /// The line of a commit with the file's content; `None` if the last commit has it.
    fn regular_line(&self) -> Result<Option<String>> {
        let path = &self.file.path;
        let content = std::fs::read(path).map_err(Error::io(path))?;
        let mut hash = Context::new(&SHA1_FOR_LEGACY_USE_ONLY); // Git's id of a content
        hash.update(format!("blob {}\0", content.len()).as_bytes());
        hash.update(&content);
        if self.mode.oid.as_ref() == Some(&hex(hash)) {
            return Ok(None);
        }
        let content = BASE64_STANDARD.encode(content);
        let value = json!({"content": content, "path": self.file.name, "encoding": "base64"});
        Ok(Some(json!({"key": "file", "value": value}).to_string()))
    }
}

fn lfs_line(file: &LfsFile<'_>) -> String {
    json!({"key": "lfsFile", "value": {"path": file.name, "algo": "sha256", "oid": file.oid, "size": file.size}})
        .to_string()
}

fn hex(hash: Context) -> String {
    hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
