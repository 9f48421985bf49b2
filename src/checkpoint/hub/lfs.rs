//! Uploads by LFS: to addresses that the Hub gives, in one piece or in parts.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Take};
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use ureq::SendBody;

use super::api::{Api, Fault};
use super::upload::{Branch, LFS_JSON, PAUSES, parsed, persistently, words_of};
use crate::process::progress::Progress;

/// A file to upload by LFS.
#[derive(Debug, Clone)]
pub struct LfsFile<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// Its name in the repository.
    pub name: &'a str,
    /// SHA-256 of its content, in hexadecimal digits.
    pub oid: String,
    /// Its size (bytes).
    pub size: u64,
}

/// Where an LFS object goes, and what confirms it; neither if the Hub has it.
#[derive(Debug, Default, Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Debug, Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: Map<String, Value>,
}

impl Api {
    /// Uploads those of the files that the Hub does not have, and tells of each. One that was uploaded is not uploaded again, neither
    /// when a later one fails nor in a later call.
    pub fn upload(&self, branch: &Branch<'_>, files: &[LfsFile<'_>], say: &dyn Fn(&str)) -> Result<(), Fault> {
        let mut links_are_old = false;
        loop {
            let mut done = Ok(());
            for (file, actions) in files.iter().zip(self.lfs_actions(branch, files)?) {
                done = self.upload_one(file, &actions, say);
                if done.is_err() {
                    break;
                }
            }
            match done {
                // An upload of hours can outlive the addresses that it began with.
                Err(Fault::Refused(403, _)) if !links_are_old => links_are_old = true,
                done => return done,
            }
        }
    }

    fn lfs_actions(&self, branch: &Branch<'_>, files: &[LfsFile<'_>]) -> Result<Vec<Actions>, Fault> {
        #[derive(Deserialize)]
        struct Batch {
            objects: Vec<Object>,
        }
        #[derive(Deserialize)]
        struct Object {
            oid: String,
            #[serde(default)]
            actions: Option<Actions>,
            #[serde(default)]
            error: Option<Value>,
        }
        let objects: Vec<Value> = files.iter().map(|file| json!({"oid": file.oid, "size": file.size})).collect();
        let body = json!({"operation": "upload", "transfers": ["basic", "multipart"], "objects": objects,
            "hash_algo": "sha256", "ref": {"name": branch.name}});
        let address = format!("{}/{}{}.git/info/lfs/objects/batch", self.endpoint(), branch.kind.prefix(), branch.id);
        let answer = self.post(&address, LFS_JSON, body.to_string().as_bytes())?;
        let mut objects = parsed::<Batch>(&answer)?.objects;
        let of_file = |file: &LfsFile<'_>| {
            let found = objects.iter_mut().find(|object| object.oid == file.oid);
            let found = found.ok_or_else(|| Fault::Garbled(format!("says nothing of {}", file.name)))?;
            match found.error.take() {
                Some(error) => Err(Fault::Refused(422, format!("{}: {}", file.name, words_of(&error)))),
                // A second file of the same content has nothing left to upload.
                None => Ok(found.actions.take().unwrap_or_default()),
            }
        };
        files.iter().map(of_file).collect()
    }

    fn upload_one(&self, file: &LfsFile<'_>, actions: &Actions, say: &dyn Fn(&str)) -> Result<(), Fault> {
        let Some(upload) = &actions.upload else {
            say(&format!("{}: is there already", file.name));
            return Ok(());
        };
        match upload.header.get("chunk_size") {
            Some(size) => self.put_parts(file, upload, number(size)?)?,
            None => {
                self.put(file, &upload.href, 0..file.size)?;
            }
        }
        if let Some(verify) = &actions.verify {
            let body = json!({"oid": file.oid, "size": file.size});
            self.post(&verify.href, LFS_JSON, body.to_string().as_bytes())?;
        }
        say(&format!("{}: uploaded {} bytes", file.name, file.size));
        Ok(())
    }

    /// Uploads a file in parts, each to an address of its own, and has them put together.
    fn put_parts(&self, file: &LfsFile<'_>, upload: &Action, part_size: u64) -> Result<(), Fault> {
        let mut parts = Vec::new();
        while (parts.len() as u64) * part_size < file.size {
            let number = parts.len() + 1;
            let mut links = upload.header.iter().filter(|(name, _)| name.parse() == Ok(number));
            let link = links.next().and_then(|(_, link)| link.as_str());
            let link = link.ok_or_else(|| Fault::Garbled(format!("{}: no address for part {number}", file.name)))?;
            let from = (number as u64 - 1) * part_size;
            let etag = self.put(file, link, from..file.size.min(from + part_size))?;
            let etag = etag.ok_or_else(|| Fault::Garbled(format!("{}: no ETag for part {number}", file.name)))?;
            parts.push(json!({"partNumber": number, "etag": etag}));
        }
        let body = json!({"oid": file.oid, "parts": parts});
        self.post(&upload.href, LFS_JSON, body.to_string().as_bytes()).map(drop)
    }

    /// Uploads a range of a file, and returns the tag of what the server got.
    fn put(&self, file: &LfsFile<'_>, link: &str, range: Range<u64>) -> Result<Option<String>, Fault> {
        persistently(&PAUSES, || {
            let mut reader = PartReader::open(file, range.clone()).map_err(Fault::Disk)?;
            let request = self.patient(self.agent.put(link)).header("Content-Length", range.end - range.start);
            let answer = self.answer(request, SendBody::from_reader(&mut reader))?;
            Ok(answer.headers().get("etag").and_then(|tag| Some(tag.to_str().ok()?.to_owned())))
        })
    }
}

/// A part of a file on its way, which tells how far it is.
struct PartReader<'a> {
    file: Take<File>,
    from: u64,
    sent: u64,
    whole: &'a LfsFile<'a>,
    progress: Progress,
}

impl<'a> PartReader<'a> {
    fn open(whole: &'a LfsFile<'a>, range: Range<u64>) -> std::io::Result<Self> {
        let mut file = File::open(whole.path)?;
        file.seek(SeekFrom::Start(range.start))?;
        let file = file.take(range.end - range.start);
        Ok(Self { file, from: range.start, sent: 0, whole, progress: Progress::new("export-hf") })
    }
}

impl Read for PartReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.sent += read as u64;
        let (done, whole) = (self.from + self.sent, self.whole);
        self.progress.update(|| format!("{}: {} of {} MB", whole.name, done / 1_000_000, whole.size / 1_000_000));
        Ok(read)
    }
}

/// A number above 0 that is written as one or as a text.
fn number(value: &Value) -> Result<u64, Fault> {
    let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
    number.filter(|number| *number > 0).ok_or_else(|| Fault::Garbled("bad chunk_size".into()))
}
