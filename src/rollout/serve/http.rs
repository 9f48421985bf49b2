//! The part of HTTP/1.1 that the server speaks: requests with a body of known length, answers as a whole or in chunks.
//!
//! Whatever a client sends, or does not send or read, takes bounded memory and time.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longest head of a request (bytes), and most headers in it.
const MAX_HEAD: usize = 32 << 10;
const MAX_HEADERS: usize = 64;
/// Longest body of a request (bytes).
const MAX_BODY: usize = 1 << 20;
/// How long a connection may wait for its next request.
const IDLE: Duration = Duration::from_secs(60);
/// How long a request may take to arrive once it has begun, and how long a client may not read its answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// A request.
pub struct HttpRequest {
    /// `GET`, `POST`, ...
    pub method: String,
    /// Without the query.
    pub path: String,
    /// The header of that name.
    pub authorization: Option<String>,
    /// What follows the head.
    pub body: Vec<u8>,
}

/// A connection to a client.
pub struct Connection {
    stream: TcpStream,
    /// Received, and not yet part of a request.
    received: Vec<u8>,
    /// Whether another request may follow.
    keeps: bool,
    /// Whether the client understands chunks.
    has_chunks: bool,
}

/// Why a request is not taken.
struct Bad(u16, &'static str);

impl From<io::Error> for Bad {
    /// Of a client that is gone or silent; nobody reads it.
    fn from(_: io::Error) -> Self {
        Self(408, "the request did not arrive in time")
    }
}

struct Head {
    request: HttpRequest,
    length: usize,
    keeps: bool,
    has_chunks: bool,
    expects_continue: bool,
}

impl Connection {
    /// Takes over a stream.
    ///
    /// # Errors
    /// Those of the stream's options.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, received: Vec::new(), keeps: true, has_chunks: true })
    }

    /// Waits for the next request. Returns `None` when there is none, because the client has left, was refused, or does not go on.
    pub fn receive(&mut self, refusal: impl FnOnce(u16, &str) -> Vec<u8>) -> Option<HttpRequest> {
        if !self.keeps || (self.received.is_empty() && !matches!(self.fill(Instant::now() + IDLE), Ok(1..))) {
            return None;
        }
        match self.receive_all(Instant::now() + PATIENCE) {
            Ok(request) => Some(request),
            Err(Bad(status, what)) => {
                self.keeps = false;
                let _ = self.respond(status, &[], &refusal(status, what));
                self.discard();
                None
            }
        }
    }

    fn receive_all(&mut self, until: Instant) -> Result<HttpRequest, Bad> {
        let mut searched = 0;
        let end = loop {
            let end = self.received[searched..].windows(4).position(|four| four == b"\r\n\r\n");
            let end = end.map(|at| searched + at + 4);
            if end.unwrap_or(self.received.len()) > MAX_HEAD {
                return Err(Bad(431, "the request's headers are too long"));
            }
            if let Some(end) = end {
                break end;
            }
            searched = self.received.len().saturating_sub(3);
            self.fill_some(until)?;
        };
        let head = parse_head(&self.received[..end])?;
        (self.keeps, self.has_chunks) = (head.keeps, head.has_chunks);
        self.received.drain(..end);
        if head.expects_continue && self.received.is_empty() && head.length > 0 {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        while self.received.len() < head.length {
            self.fill_some(until)?;
        }
        let body = self.received.drain(..head.length).collect();
        Ok(HttpRequest { body, ..head.request })
    }

    fn fill_some(&mut self, until: Instant) -> io::Result<()> {
        match self.fill(until)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    fn fill(&mut self, until: Instant) -> io::Result<usize> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut buffer = [0; 1 << 14];
        let read = self.stream.read(&mut buffer)?;
        self.received.extend_from_slice(&buffer[..read]);
        Ok(read)
    }

    /// Reads on for a moment: a connection that is closed with bytes unread is reset, and the client may lose the answer.
    fn discard(&mut self) {
        let until = Instant::now() + Duration::from_secs(1);
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        let mut discarded = 0;
        while discarded < 64 * MAX_BODY
            && let Ok(read @ 1..) = self.fill(until)
        {
            discarded += read;
            self.received.clear();
        }
    }

    /// Whether the client has closed the connection.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        let mut polled = [PollFd::new(&self.stream, PollFlags::IN)];
        let has_news = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0);
        has_news && !matches!(self.stream.peek(&mut [0]), Ok(1..))
    }

    /// Closes the connection after the next answer.
    pub fn end_after_answer(&mut self) {
        self.keeps = false;
    }

    /// Sends a whole answer of JSON.
    ///
    /// # Errors
    /// When the client is gone, or does not read.
    pub fn respond(&mut self, status: u16, headers: &[(&str, &str)], body: &[u8]) -> io::Result<()> {
        let length = body.len().to_string();
        let own = [("Content-Type", "application/json"), ("Content-Length", length.as_str())];
        let head = self.head(status, &[&own, headers].concat());
        self.stream.write_all(&[head.as_bytes(), body].concat())
    }

    /// Begins an answer of events.
    ///
    /// # Errors
    /// As for [`Connection::respond`].
    pub fn begin_events(&mut self) -> io::Result<()> {
        self.keeps &= self.has_chunks;
        let mut headers = vec![("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache")];
        if self.has_chunks {
            headers.push(("Transfer-Encoding", "chunked"));
        }
        let head = self.head(200, &headers);
        self.stream.write_all(head.as_bytes())
    }

    /// Sends some events, at least one.
    ///
    /// # Errors
    /// As for [`Connection::respond`].
    pub fn send_events(&mut self, events: &str) -> io::Result<()> {
        let chunk = format!("{:x}\r\n{events}\r\n", events.len());
        self.stream.write_all(if self.has_chunks { chunk.as_bytes() } else { events.as_bytes() })
    }

    /// Ends an answer of events.
    ///
    /// # Errors
    /// As for [`Connection::respond`].
    pub fn end_events(&mut self) -> io::Result<()> {
        if self.has_chunks { self.stream.write_all(b"0\r\n\r\n") } else { Ok(()) }
    }

    fn head(&self, status: u16, headers: &[(&str, &str)]) -> String {
        let connection = [("Connection", if self.keeps { "keep-alive" } else { "close" })];
        let lines = headers.iter().chain(&connection).map(|(name, value)| format!("{name}: {value}\r\n"));
        format!("HTTP/1.1 {status} {}\r\n{}\r\n", reason(status), lines.collect::<String>())
    }
}

fn parse_head(bytes: &[u8]) -> Result<Head, Bad> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    if !matches!(parsed.parse(bytes), Ok(httparse::Status::Complete(_))) {
        return Err(Bad(400, "the request is not HTTP/1.1"));
    }
    let all = |name: &str| -> Vec<&[u8]> {
        let named = parsed.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
        named.map(|header| header.value).collect()
    };
    let has = |name: &str, word: &str| {
        let text = |value: &&[u8]| String::from_utf8_lossy(value).to_ascii_lowercase();
        all(name).iter().map(text).any(|value| value.split(',').any(|one| one.trim() == word))
    };
    if !all("transfer-encoding").is_empty() {
        return Err(Bad(411, "the request has no Content-Length"));
    }
    let length = match all("content-length")[..] {
        [] => 0,
        [value] if !value.is_empty() && value.iter().all(u8::is_ascii_digit) => {
            let digits = String::from_utf8_lossy(value);
            digits
                .parse()
                .ok()
                .filter(|&length| length <= MAX_BODY)
                .ok_or(Bad(413, "the request is longer than 1 MiB"))?
        }
        _ => return Err(Bad(400, "the request's Content-Length is not a number")),
    };
    let is_newer = parsed.version == Some(1);
    let text = |value: Option<&str>| value.unwrap_or_default().to_owned();
    let request = HttpRequest {
        method: text(parsed.method),
        path: text(parsed.path.and_then(|path| path.split('?').next())),
        authorization: all("authorization").first().map(|value| String::from_utf8_lossy(value).into_owned()),
        body: Vec::new(),
    };
    let keeps = if is_newer { !has("connection", "close") } else { has("connection", "keep-alive") };
    Ok(Head { request, length, keeps, has_chunks: is_newer, expects_continue: has("expect", "100-continue") })
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}
