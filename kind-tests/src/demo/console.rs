//! What the demo prints: lines with the time since its start, and on a terminal a block that is redrawn in place.
//!
//! Plain ANSI sequences: colours, "go up n lines", "clear the line". Nothing has to be undone when the demo ends at
//! any point. Nothing fails because nobody reads: a closed pipe or a terminal that hung up must not stop a clean-up.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::termios::tcgetwinsize;

use crate::process::lock;
use crate::scratch;

/// Width when nobody says how wide the terminal is.
const DEFAULT_WIDTH: usize = 100;
/// Below this the live view makes no sense; it is cut off there, as an editor would be.
const LEAST_WIDTH: usize = 40;
/// Width of `[123.4s] `; what belongs to a line is indented by it.
const INDENT: &str = "         ";

/// How a piece of text looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    /// As the terminal has it.
    Plain,
    /// What the eye should find first.
    Bold,
    /// What it may skip.
    Dim,
    /// Done well.
    Good,
    /// Failed.
    Bad,
    /// Waits, or is disturbed.
    Warn,
    /// Under way.
    Busy,
}

impl Paint {
    const fn code(self) -> &'static str {
        match self {
            Paint::Plain => "",
            Paint::Bold => "1",
            Paint::Dim => "2",
            Paint::Good => "32",
            Paint::Bad => "31",
            Paint::Warn => "33",
            Paint::Busy => "36",
        }
    }
}

/// A piece of text with its look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// No line breaks, no escapes.
    pub text: String,
    /// Its look.
    pub paint: Paint,
}

/// Makes a [`Span`].
pub fn span(paint: Paint, text: impl Into<String>) -> Span {
    Span { text: text.into(), paint }
}

/// One line of the screen.
pub type Line = Vec<Span>;

/// The only place that writes to stdout.
pub struct Console {
    start: Instant,
    /// Redraw in place.
    pub live: bool,
    /// The terminal shows more than ASCII.
    pub unicode: bool,
    colour: bool,
    /// Lines of the block that was drawn last and may be drawn over.
    drawn: Mutex<usize>,
}

impl Console {
    /// Looks at the environment once. `plain` asks for lines also on a terminal.
    pub fn new(plain: bool) -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let terminal = std::io::stdout().is_terminal() && set("TERM").is_some_and(|t| t != "dumb");
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set).unwrap_or_default().to_lowercase();
        Self {
            start: Instant::now(),
            live: terminal && !plain,
            unicode: locale.contains("utf-8") || locale.contains("utf8"),
            colour: terminal && set("NO_COLOR").is_none(),
            drawn: Mutex::new(0),
        }
    }

    /// Since the start of the demo.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Columns and rows of the terminal now.
    pub fn size(&self) -> (usize, usize) {
        let size = tcgetwinsize(std::io::stdout()).ok().map(|s| (usize::from(s.ws_col), usize::from(s.ws_row)));
        let (columns, rows) = size.unwrap_or((0, 0));
        let columns = if columns == 0 { DEFAULT_WIDTH } else { columns.max(LEAST_WIDTH) };
        (columns, if rows == 0 { 24 } else { rows })
    }

    /// A new part of the demo.
    pub fn step(&self, text: &str) {
        self.print("\n");
        self.stamped(Paint::Bold, text);
    }

    /// Something that happened.
    pub fn note(&self, text: &str) {
        self.stamped(Paint::Plain, text);
    }

    /// More about the line before.
    pub fn more(&self, text: &str) {
        self.print(&format!("{INDENT}{text}\n"));
    }

    /// A line made of spans, with the time.
    pub fn line(&self, line: &Line) {
        self.print(&format!("{} {}\n", self.stamp(), self.render(line)));
    }

    /// A line of a table.
    pub fn row(&self, line: &Line) {
        self.more(&self.render(line));
    }

    /// A command as the user would type it.
    pub fn command(&self, command: &str) {
        self.stamped(Paint::Bold, &format!("$ {command}"));
    }

    /// What a command printed. On a terminal, long lines go on indented, as otherwise only a wide one could be read.
    pub fn output(&self, text: &str) {
        for line in text.trim_end().lines().flat_map(|line| wrap(line, self.width())) {
            self.more(&line);
        }
    }

    /// How the demo ended.
    pub fn result(&self, paint: Paint, text: &str) {
        self.print("\n");
        self.stamped(paint, text);
    }

    /// Draws a block over the one before. Lines must fit the width.
    pub fn draw(&self, lines: &[Line]) {
        let mut drawn = lock(&self.drawn);
        let mut text = String::new();
        if *drawn > 0 {
            text.push_str(&format!("\x1b[{}F", *drawn));
        }
        for line in lines {
            text.push_str(&format!("{}\x1b[K\n", self.render(line)));
        }
        // The block before may have been longer.
        text.push_str("\x1b[J");
        *drawn = lines.len();
        self.print(&text);
    }

    /// Leaves the block as it stands; what comes next is printed below it.
    pub fn settle(&self) {
        *lock(&self.drawn) = 0;
    }

    /// Text in a look, or as it is when there are no colours.
    pub fn paint(&self, paint: Paint, text: &str) -> String {
        match paint {
            Paint::Plain => text.to_owned(),
            _ if !self.colour => text.to_owned(),
            _ => format!("\x1b[{}m{text}\x1b[0m", paint.code()),
        }
    }

    /// Columns beside the time; without end where nothing is redrawn and lines may be searched.
    fn width(&self) -> usize {
        if self.live { self.size().0.saturating_sub(INDENT.len() + 1) } else { usize::MAX }
    }

    fn stamped(&self, paint: Paint, text: &str) {
        for (n, line) in wrap(text, self.width()).iter().enumerate() {
            let lead = if n == 0 { format!("{} ", self.stamp()) } else { INDENT.to_owned() };
            self.print(&format!("{lead}{}\n", self.paint(paint, line)));
        }
    }

    fn render(&self, line: &Line) -> String {
        // Spaces at the end would wrap on a narrow terminal.
        let last = line.iter().rposition(|s| !s.text.trim_end().is_empty());
        let text = |(n, s): (usize, &Span)| {
            let text = if Some(n) == last { s.text.trim_end() } else { &s.text };
            self.paint(s.paint, text)
        };
        line.iter().enumerate().take(last.map_or(0, |n| n + 1)).map(text).collect()
    }

    fn stamp(&self) -> String {
        self.paint(Paint::Dim, &format!("[{:5.1}s]", self.elapsed().as_secs_f64()))
    }

    fn print(&self, text: &str) {
        // The clean-up after a signal has the last word.
        if scratch::interrupted() {
            return;
        }
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

/// Cuts a line to `width` columns, with an ellipsis where something is missing. Every character counts as one column.
pub fn fit(line: Line, width: usize, unicode: bool) -> Line {
    let ellipsis = if unicode { "…" } else { "~" };
    let length: usize = line.iter().map(|s| s.text.chars().count()).sum();
    if length <= width {
        return line;
    }
    let mut left = width.saturating_sub(1);
    let mut cut = Line::new();
    for Span { text, paint } in line {
        let kept: String = text.chars().take(left).collect();
        left -= kept.chars().count();
        let whole = kept.len() == text.len();
        cut.push(span(paint, if whole { kept } else { kept + ellipsis }));
        if !whole {
            break;
        }
        if left == 0 {
            cut.push(span(paint, ellipsis));
            break;
        }
    }
    cut
}

/// Breaks a line between words; the space there is left out, be it as wide as a column of a table.
pub fn wrap(line: &str, width: usize) -> Vec<String> {
    let lead = line.len() - line.trim_start().len();
    let hang = " ".repeat((lead + 4).min(width / 2));
    let mut lines = Vec::new();
    let mut now = String::new();
    let mut space = String::new();
    for word in line.trim_end().split(' ') {
        let needed = now.chars().count() + space.len() + word.chars().count();
        if needed > width && !now.trim().is_empty() && !word.is_empty() {
            lines.push(std::mem::replace(&mut now, format!("{hang}{word}")));
            space.clear();
        } else if !word.is_empty() {
            now.push_str(&space);
            now.push_str(word);
            space.clear();
        }
        space.push(' ');
    }
    lines.push(now);
    lines
}

/// Width of what [`Console::more`] indents by.
pub const fn indent() -> usize {
    INDENT.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(line: &Line) -> String {
        line.iter().map(|s| s.text.as_str()).collect()
    }

    #[test]
    fn long_lines_go_on_indented_and_columns_collapse_where_they_break() {
        let cases: [(&str, usize, &[&str]); 6] = [
            ("a b", usize::MAX, &["a b"]),
            ("", 20, &[""]),
            ("  one two three", 10, &["  one two", "     three"]),
            ("NAME   MESSAGE              AGE", 20, &["NAME   MESSAGE", "    AGE"]),
            ("NAME   AGE       ", 12, &["NAME   AGE"]),
            ("averyveryverylongword b", 10, &["averyveryverylongword", "    b"]),
        ];
        for (line, width, expected) in cases {
            assert_eq!(wrap(line, width), expected, "{line:?}");
        }
    }

    #[test]
    fn lines_are_cut_to_the_width_with_an_ellipsis() {
        let line = || vec![span(Paint::Bold, "node-1"), span(Paint::Plain, "  äöü ready")];
        for (width, expected) in
            [(17, "node-1  äöü ready"), (16, "node-1  äöü rea…"), (7, "node-1…"), (6, "node-…"), (1, "…")]
        {
            assert_eq!(text(&fit(line(), width, true)), expected, "{width}");
        }
        assert_eq!(text(&fit(line(), 7, false)), "node-1~");
    }
}
