//! A static HTTP/1.1 server for an OSTree repository that can be told to misbehave.
//!
//! A thread per connection with keep-alive and one write per small answer: a pull of ten thousand objects is not slowed
//! by it. Faults are rules on path patterns, counted and limited; the first rule that matches applies.
//!
//! Serves files below its folder only, GET and HEAD only, no ranges (libostree asks for none).

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::net::sockopt::set_socket_linger;

use crate::process::lock;

/// Granularity of rate limiting.
const CHUNK: usize = 16 * 1024;
/// How often a hanging answer looks whether it may end.
const TICK: Duration = Duration::from_millis(20);

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This status with a short text instead of the file.
    Status(u16),
    /// One bit in the middle of the file is wrong.
    FlipByte,
    /// The full length is announced, the connection is cut after half of it.
    Truncate,
    /// Half of the file with a length that agrees.
    Short,
    /// The request is read and never answered.
    Hang,
    /// The connection is reset instead of an answer.
    Reset,
    /// The answer comes late.
    Delay(Duration),
    /// The answer comes slowly: bytes per second, shared by all connections.
    Rate(u64),
}

/// A fault on the paths that match a pattern.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Identifies the rule for [`RepoServer::remove`].
    pub id: u64,
    /// `*` stands for any run of characters; without one, the path must contain the pattern.
    pub pattern: String,
    /// What happens.
    pub fault: Fault,
    /// How often still; `None` is for ever.
    pub remaining: Option<u64>,
    /// How often it has happened.
    pub hits: u64,
}

/// What has been served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests read.
    pub requests: u64,
    /// Body bytes written.
    pub bytes: u64,
    /// Answers with a status of 400 and above.
    pub errors: u64,
    /// Connections accepted.
    pub connections: u64,
}

/// A running server. It stops when dropped.
pub struct RepoServer {
    shared: Arc<Shared>,
    accept: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    root: PathBuf,
    address: Mutex<SocketAddr>,
    stop: AtomicBool,
    rules: Mutex<Vec<Rule>>,
    next_rule: AtomicU64,
    open: Mutex<HashMap<u64, TcpStream>>,
    next_connection: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    paths: Mutex<HashMap<String, u64>>,
    bucket: Mutex<Option<Instant>>,
}

impl RepoServer {
    /// Serves `root` on a free loopback port.
    pub fn start(root: &Path) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("bind the repository server")?;
        let shared = Arc::new(Shared {
            root: root.to_owned(),
            address: Mutex::new(listener.local_addr()?),
            stop: AtomicBool::new(false),
            rules: Mutex::default(),
            next_rule: AtomicU64::new(1),
            open: Mutex::default(),
            next_connection: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            paths: Mutex::default(),
            bucket: Mutex::default(),
        });
        let server = Self { shared, accept: Mutex::default() };
        server.listen(listener);
        Ok(server)
    }

    /// `http://127.0.0.1:PORT`; stays the same across [`RepoServer::down`] and [`RepoServer::up`].
    pub fn url(&self) -> String {
        format!("http://{}", *lock(&self.shared.address))
    }

    /// Adds a fault for all later requests whose path matches; returns its id.
    pub fn inject(&self, pattern: &str, fault: Fault) -> u64 {
        self.add(pattern, fault, None)
    }

    /// Adds a fault for the next `times` requests whose path matches; returns its id.
    pub fn inject_times(&self, pattern: &str, fault: Fault, times: u64) -> u64 {
        self.add(pattern, fault, Some(times))
    }

    /// Takes one fault away.
    pub fn remove(&self, id: u64) {
        lock(&self.shared.rules).retain(|rule| rule.id != id);
    }

    /// Takes all faults away.
    pub fn clear(&self) {
        lock(&self.shared.rules).clear();
    }

    /// How often a fault has happened.
    pub fn hits(&self, id: u64) -> u64 {
        lock(&self.shared.rules).iter().find(|r| r.id == id).map_or(0, |r| r.hits)
    }

    /// Closes all connections and refuses new ones.
    pub fn down(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Wakes the accepting thread; it may have gone already.
        let _ = TcpStream::connect(*lock(&self.shared.address));
        if let Some(handle) = lock(&self.accept).take() {
            let _ = handle.join();
        }
        for stream in lock(&self.shared.open).values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Listens again, on the same port.
    pub fn up(&self) -> Result<()> {
        if lock(&self.accept).is_some() {
            return Ok(());
        }
        let address = *lock(&self.shared.address);
        let listener = TcpListener::bind(address).with_context(|| format!("bind {address} again"))?;
        self.shared.stop.store(false, Ordering::SeqCst);
        self.listen(listener);
        Ok(())
    }

    /// What has been served so far.
    pub fn stats(&self) -> Stats {
        let s = &self.shared;
        Stats {
            requests: s.requests.load(Ordering::Relaxed),
            bytes: s.bytes.load(Ordering::Relaxed),
            errors: s.errors.load(Ordering::Relaxed),
            connections: s.next_connection.load(Ordering::Relaxed),
        }
    }

    /// How many requests there were for paths that match.
    pub fn requests_for(&self, pattern: &str) -> u64 {
        lock(&self.shared.paths).iter().filter(|(path, _)| matches(pattern, path)).map(|(_, n)| n).sum()
    }

    fn add(&self, pattern: &str, fault: Fault, remaining: Option<u64>) -> u64 {
        let id = self.shared.next_rule.fetch_add(1, Ordering::Relaxed);
        lock(&self.shared.rules).push(Rule { id, pattern: pattern.to_owned(), fault, remaining, hits: 0 });
        id
    }

    fn listen(&self, listener: TcpListener) {
        let shared = Arc::clone(&self.shared);
        let handle = thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.connection(stream));
            }
        });
        *lock(&self.accept) = Some(handle);
    }
}

impl Drop for RepoServer {
    fn drop(&mut self) {
        self.down();
    }
}

/// How an exchange leaves the connection.
enum Next {
    KeepAlive,
    Close,
    /// Closed without a goodbye.
    Reset,
}

impl Shared {
    fn connection(&self, stream: TcpStream) {
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let _ = stream.set_nodelay(true);
        let (Ok(reader), Ok(registered)) = (stream.try_clone(), stream.try_clone()) else { return };
        lock(&self.open).insert(id, registered);
        let mut reader = BufReader::new(reader);
        // An error is the client going away, or `down`.
        let last = loop {
            match self.exchange(&mut reader, &stream) {
                Ok(Next::KeepAlive) => {}
                end => break end,
            }
        };
        lock(&self.open).remove(&id);
        if !matches!(last, Ok(Next::Reset)) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn exchange(&self, reader: &mut impl BufRead, mut stream: &TcpStream) -> io::Result<Next> {
        let Some(request) = read_request(reader)? else { return Ok(Next::Close) };
        if self.stop.load(Ordering::SeqCst) {
            return Ok(Next::Close);
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        *lock(&self.paths).entry(request.path.clone()).or_default() += 1;

        let fault = self.fault_for(&request.path);
        match &fault {
            Some(Fault::Status(code)) => return self.refuse(stream, *code, request.keep_alive),
            Some(Fault::Reset) => {
                let _ = set_socket_linger(stream, Some(Duration::ZERO));
                return Ok(Next::Reset);
            }
            Some(Fault::Hang) => {
                self.hang(stream);
                return Ok(Next::Close);
            }
            Some(Fault::Delay(delay)) => self.pause(*delay),
            Some(Fault::FlipByte | Fault::Truncate | Fault::Short | Fault::Rate(_)) | None => {}
        }

        let mut body = match self.read(&request.path) {
            Ok(body) => body,
            Err(_) => return self.refuse(stream, 404, request.keep_alive),
        };
        if fault == Some(Fault::FlipByte)
            && let Some(byte) = {
                let middle = body.len() / 2;
                body.get_mut(middle)
            }
        {
            *byte ^= 0x10;
        }
        if fault == Some(Fault::Short) {
            body.truncate(body.len() / 2);
        }
        let connection = if request.keep_alive { "keep-alive" } else { "close" };
        let mut answer =
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n", body.len())
                .into_bytes();
        if request.head {
            stream.write_all(&answer)?;
            return Ok(request.next());
        }
        if fault == Some(Fault::Truncate) {
            body.truncate(body.len() / 2);
            answer.extend_from_slice(&body);
            stream.write_all(&answer)?;
            return Ok(Next::Close);
        }
        self.bytes.fetch_add(body.len() as u64, Ordering::Relaxed);
        if let Some(Fault::Rate(rate)) = fault {
            stream.write_all(&answer)?;
            for chunk in body.chunks(CHUNK) {
                self.take_turn(chunk.len() as u64, rate);
                stream.write_all(chunk)?;
            }
        } else {
            answer.append(&mut body);
            stream.write_all(&answer)?;
        }
        Ok(request.next())
    }

    fn fault_for(&self, path: &str) -> Option<Fault> {
        let mut rules = lock(&self.rules);
        let rule = rules.iter_mut().find(|r| r.remaining != Some(0) && matches(&r.pattern, path))?;
        rule.remaining = rule.remaining.map(|n| n - 1);
        rule.hits += 1;
        Some(rule.fault.clone())
    }

    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let relative = Path::new(path.trim_start_matches('/'));
        if relative.components().any(|c| !matches!(c, Component::Normal(_))) {
            return Err(io::ErrorKind::NotFound.into());
        }
        fs::read(self.root.join(relative))
    }

    fn refuse(&self, mut stream: &TcpStream, code: u16, keep_alive: bool) -> io::Result<Next> {
        self.errors.fetch_add(1, Ordering::Relaxed);
        let connection = if keep_alive { "keep-alive" } else { "close" };
        write!(stream, "HTTP/1.1 {code} Fault\r\nContent-Length: 6\r\nConnection: {connection}\r\n\r\nfault\n")?;
        Ok(if keep_alive { Next::KeepAlive } else { Next::Close })
    }

    /// Waits until the client has gone, or we are told to stop, or nobody wants hanging any more.
    fn hang(&self, stream: &TcpStream) {
        let _ = stream.set_read_timeout(Some(TICK));
        let mut byte = [0; 1];
        while !self.stop.load(Ordering::SeqCst) {
            let wanted = lock(&self.rules).iter().any(|r| r.fault == Fault::Hang);
            match (&*stream).read(&mut byte) {
                Ok(0) => return,
                Err(e) if !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return,
                _ if !wanted => return,
                _ => {}
            }
        }
    }

    fn pause(&self, delay: Duration) {
        let end = Instant::now() + delay;
        while !self.stop.load(Ordering::SeqCst) && Instant::now() < end {
            thread::sleep(TICK.min(end.saturating_duration_since(Instant::now())));
        }
    }

    fn take_turn(&self, bytes: u64, rate: u64) {
        let cost = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let turn = {
            let mut bucket = lock(&self.bucket);
            let now = Instant::now();
            let turn = bucket.map_or(now, |free| free.max(now)) + cost;
            *bucket = Some(turn);
            turn
        };
        self.pause(turn.saturating_duration_since(Instant::now()));
    }
}

struct HttpRequest {
    path: String,
    head: bool,
    keep_alive: bool,
}

impl HttpRequest {
    fn next(&self) -> Next {
        if self.keep_alive { Next::KeepAlive } else { Next::Close }
    }
}

/// Reads one request; `None` at the end of the connection or when it is not HTTP.
fn read_request(reader: &mut impl BufRead) -> io::Result<Option<HttpRequest>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(None) };
    let http10 = words.next() == Some("HTTP/1.0");
    let mut request = HttpRequest {
        path: target.split('?').next().unwrap_or_default().to_owned(),
        head: method == "HEAD",
        keep_alive: !http10,
    };
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 {
            return Ok(None);
        }
        let header = header.trim();
        if header.is_empty() {
            return Ok(Some(request));
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("connection")
        {
            request.keep_alive = !value.trim().eq_ignore_ascii_case("close");
        }
    }
}

/// Whether `path` matches: pieces between `*` occur in order, the ends are free.
fn matches(pattern: &str, path: &str) -> bool {
    let mut rest = path;
    let mut pieces = pattern.split('*').filter(|p| !p.is_empty()).peekable();
    let anchored_end = !pattern.ends_with('*') && pattern.contains('*');
    while let Some(piece) = pieces.next() {
        if anchored_end && pieces.peek().is_none() {
            return rest.ends_with(piece);
        }
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, path, expected, fact) in [
            ("objects/", "/objects/ab/cd.filez", true, "a plain pattern is contained"),
            ("objects/*.filez", "/objects/ab/cd.filez", true, "a star spans folders"),
            ("objects/*.filez", "/objects/ab/cd.filezz", false, "a piece after a star is the end"),
            ("*", "/anything", true, "a star is everything"),
            ("", "/anything", true, "so is nothing"),
            ("*.commit", "/objects/ab/cd.dirtree", false, "the end differs"),
        ] {
            assert_eq!(matches(pattern, path), expected, "{fact}");
        }
    }

    fn get(url: &str, path: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect(url.trim_start_matches("http://"))?;
        write!(stream, "GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    #[test]
    fn serves_misbehaves_and_comes_back_on_the_same_port() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "0123456789").unwrap();
        let server = RepoServer::start(dir.path()).unwrap();
        let url = server.url();
        assert!(get(&url, "/a").unwrap().ends_with("0123456789"));
        assert!(get(&url, "/../a").unwrap().starts_with("HTTP/1.1 404"));

        let flip = server.inject_times("/a", Fault::FlipByte, 1);
        assert!(get(&url, "/a").unwrap().ends_with("01234%6789"));
        assert_eq!(server.hits(flip), 1);
        assert!(get(&url, "/a").unwrap().ends_with("0123456789"), "a fault for one time happens once");
        server.inject("/a", Fault::Truncate);
        assert!(get(&url, "/a").unwrap().ends_with("01234"));
        server.clear();
        server.inject("/a", Fault::Reset);
        assert!(get(&url, "/a").is_err());
        server.clear();

        server.down();
        assert!(TcpStream::connect(url.trim_start_matches("http://")).is_err());
        server.up().unwrap();
        assert!(get(&url, "/a").unwrap().ends_with("0123456789"));
        assert_eq!(server.url(), url);
        assert_eq!(server.stats().errors, 1);
    }
}
