//! The worker's line to its daemon. It is what standard output was when the worker began; standard output itself is
//! turned over to standard error, because libostree prints to it.

use std::{
    cell::RefCell,
    fs::File,
    io::{self, Write},
    rc::Rc,
};

use crate::protocol::Line;

/// Where lines to the daemon go.
#[derive(Clone)]
pub struct Channel(Rc<RefCell<File>>);

impl Channel {
    /// Takes standard output over. Called once, before anything is printed.
    pub fn take() -> io::Result<Channel> {
        const ABOVE_STANDARD: i32 = 3;
        let own = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), ABOVE_STANDARD)?;
        rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
        Ok(Channel(Rc::new(RefCell::new(File::from(own)))))
    }

    /// Sends one line. A daemon that is gone has killed us, or is about to.
    pub fn send(&self, line: &Line) {
        if let (Ok(mut text), Ok(mut file)) = (serde_json::to_vec(line), self.0.try_borrow_mut()) {
            text.push(b'\n');
            let _ = file.write_all(&text);
        }
    }
}
