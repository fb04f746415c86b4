//! The rollout as it goes: a block that is redrawn on a terminal, lines for what has changed elsewhere.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use osimage_crds::osimage::Phase;

use super::console::{Console, Line, Paint, fit, indent, span, wrap};
use super::fleet::{Fleet, NodeTrack, Stage};

/// How often the block is redrawn.
pub const TICK: Duration = Duration::from_millis(150);
/// Events in the block.
const EVENTS: usize = 5;
/// Rows of the block besides nodes and events.
const FRAME: usize = 5 + MESSAGE;
/// Rows for the OSImage's message.
const MESSAGE: usize = 2;
/// Columns of a message that are worth showing.
const LEAST_MESSAGE: usize = 16;

/// Seconds.
const WORTH_TELLING: f64 = 0.1;

/// What is shown, and of it what was said last.
pub struct View<'a> {
    console: &'a Console,
    /// Least replicas of the workload.
    least: usize,
    said: BTreeMap<String, (Stage, String, bool)>,
    said_of_image: (Option<Phase>, String),
    told: usize,
}

impl<'a> View<'a> {
    /// A view that has said nothing yet; events from `told` on are new.
    pub fn new(console: &'a Console, least: usize, told: usize) -> Self {
        Self { console, least, said: BTreeMap::new(), said_of_image: (None, String::new()), told }
    }

    /// Shows what is new.
    pub fn show(&mut self, fleet: &Fleet) {
        if self.console.live {
            let (columns, rows) = self.console.size();
            self.console.draw(&self.block(fleet, columns, rows, Instant::now()));
        } else {
            self.say(fleet);
        }
    }

    fn block(&self, fleet: &Fleet, columns: usize, rows: usize, now: Instant) -> Vec<Line> {
        let width = columns.saturating_sub(1);
        let mut lines = vec![vec![], self.head(fleet)];
        lines.extend(self.message(fleet, width));
        lines.push(vec![]);
        lines.extend(fleet.nodes.iter().map(|(name, track)| self.node(fleet, name, track, columns, now)));
        lines.push(vec![]);
        // A block that is higher than the screen could not be redrawn.
        let room = rows.saturating_sub(FRAME + fleet.nodes.len()).min(EVENTS);
        let told = fleet.told.get(self.told.min(fleet.told.len())..).unwrap_or_default();
        let mut events: Vec<Line> = told.iter().rev().take(room).rev().map(event_line).collect();
        events.resize(room, vec![]);
        lines.extend(events);
        lines.into_iter().map(|line| fit(line, width, self.console.unicode)).collect()
    }

    fn head(&self, fleet: &Fleet) -> Line {
        let Some(image) = &fleet.image else { return vec![span(Paint::Dim, "no OSImage yet")] };
        let status = fleet.status().cloned().unwrap_or_default();
        let (available, lowest) = (fleet.workload.available(), fleet.workload.lowest());
        let paint = if lowest.is_some_and(|l| l < self.least) { Paint::Bad } else { Paint::Dim };
        vec![
            span(Paint::Bold, format!("OSImage {}  ", image.metadata.name.as_deref().unwrap_or_default())),
            phase_span(status.phase, 13),
            span(Paint::Bold, format!("UPDATED {:<6}", status.progress)),
            span(Paint::Dim, format!("to {}  ", image.spec.image.ostree.commit.short())),
            span(paint, format!("{available} replicas (at least {})", self.least)),
        ]
    }

    fn message(&self, fleet: &Fleet, width: usize) -> Vec<Line> {
        let status = fleet.status();
        let paint = match status.and_then(|s| s.phase) {
            Some(Phase::Halted) => Paint::Bad,
            Some(Phase::Updated) => Paint::Good,
            _ => Paint::Plain,
        };
        let message = status.map_or("", |s| &s.message);
        let mut rows = wrap(message, width);
        // What does not fit goes on in the last row, and is cut there.
        let rest = rows.split_off(rows.len().min(MESSAGE - 1)).iter().map(|l| l.trim()).collect::<Vec<_>>().join(" ");
        rows.push(rest);
        rows.resize(MESSAGE, String::new());
        rows.into_iter().map(|row| vec![span(paint, row)]).collect()
    }

    /// `node-1  Pulling     █████░░░░░  42%  400 kB of 900 kB  v1  cordoned  down  3.1s  message`
    fn node(&self, fleet: &Fleet, name: &str, track: &NodeTrack, columns: usize, now: Instant) -> Line {
        let stage = fleet.stage(name);
        let wide = columns >= 110;
        let (percent, amount) = progress(track, stage);
        let mark = match (track.ready(), track.cordoned()) {
            (false, _) => "not ready",
            (true, true) => "cordoned",
            (true, false) => "",
        };
        let mut line = vec![
            span(Paint::Bold, format!("{name:<8}")),
            span(paint_of(stage), format!("{:<12}", stage.as_str())),
            span(Paint::Busy, bar(percent, if wide { 20 } else { 10 }, self.console.unicode)),
            span(Paint::Plain, percent.map_or(" ".repeat(5), |p| format!("{p:>4}%"))),
        ];
        if wide {
            line.push(span(Paint::Dim, format!("  {amount:<16}")));
        }
        line.extend([
            span(Paint::Plain, format!("  v{:<3}", track.version().unwrap_or("-"))),
            span(Paint::Warn, format!("{mark:<10}")),
            span(Paint::Plain, down(track.down(now))),
        ]);
        let used: usize = line.iter().map(|s| s.text.chars().count()).sum();
        if columns.saturating_sub(used + 3) >= LEAST_MESSAGE {
            line.push(span(Paint::Dim, format!("  {}", track.message())));
        }
        line
    }

    /// One line for each thing that is not as it was said last.
    fn say(&mut self, fleet: &Fleet) {
        self.say_image(fleet);
        for (name, track) in &fleet.nodes {
            let stage = fleet.stage(name);
            let now = (stage, track.version().unwrap_or("-").to_owned(), track.cordoned());
            if self.said.get(name) == Some(&now) {
                continue;
            }
            let (_, amount) = progress(track, stage);
            let amount = if stage == Stage::Pulled { amount } else { String::new() };
            let mut facts = vec![format!("version {}", now.1)];
            facts.extend(track.cordoned().then(|| "cordoned".to_owned()));
            let seconds = track.down(Instant::now()).as_secs_f64();
            facts.extend((seconds >= WORTH_TELLING).then(|| format!("down {seconds:.1} s")));
            facts.extend((!amount.is_empty()).then_some(amount));
            self.console.line(&vec![
                span(Paint::Bold, format!("{name:<8}")),
                span(paint_of(stage), format!("{:<12}", stage.as_str())),
                span(Paint::Plain, facts.join(", ")),
            ]);
            self.said.insert(name.clone(), now);
        }
        for told in fleet.told.iter().skip(self.told) {
            self.told += 1;
            if told.warning {
                let text = format!("{}: {}", told.reason, told.note);
                self.console.line(&vec![span(Paint::Warn, format!("{:<8}", "event")), span(Paint::Plain, text)]);
            }
        }
    }

    fn say_image(&mut self, fleet: &Fleet) {
        let Some(status) = fleet.status() else { return };
        let now = (status.phase, status.progress.clone());
        if self.said_of_image != now && status.phase.is_some() {
            self.console.line(&vec![
                span(Paint::Bold, format!("{:<8}", "OSImage")),
                phase_span(status.phase, 12),
                span(Paint::Plain, format!("{} updated: {}", status.progress, status.message)),
            ]);
            self.said_of_image = now;
        }
    }
}

fn phase_span(phase: Option<Phase>, width: usize) -> super::console::Span {
    let paint = match phase {
        Some(Phase::Updated) => Paint::Good,
        Some(Phase::Halted) => Paint::Bad,
        Some(Phase::Waiting | Phase::Paused) => Paint::Warn,
        Some(Phase::Progressing | Phase::Deleting) | None => Paint::Busy,
    };
    span(paint, format!("{:<width$}", phase.map_or("-".into(), |p| format!("{p:?}"))))
}

fn event_line(told: &super::fleet::Told) -> Line {
    let paint = if told.warning { Paint::Warn } else { Paint::Dim };
    let time = format!("{:>width$}  ", format!("{:.0}s", told.at.as_secs_f64()), width = indent() - 4);
    vec![span(Paint::Dim, time), span(paint, format!("{}: {}", told.reason, told.note))]
}

fn paint_of(stage: Stage) -> Paint {
    match stage {
        Stage::Unknown | Stage::Waiting | Stage::Spared => Paint::Dim,
        Stage::Pulling | Stage::Staging | Stage::Verifying => Paint::Busy,
        Stage::Pulled => Paint::Plain,
        Stage::Cordoning | Stage::Draining | Stage::Rebooting | Stage::Releasing | Stage::RollingBack => Paint::Warn,
        Stage::Healthy | Stage::Updated => Paint::Good,
        Stage::Failed(_) | Stage::Problem => Paint::Bad,
    }
}

/// Percent and amount of the download; none before it has begun.
fn progress(track: &NodeTrack, stage: Stage) -> (Option<u64>, String) {
    if stage == Stage::Spared {
        return (None, String::new());
    }
    let done = !matches!(stage, Stage::Unknown | Stage::Waiting | Stage::Pulling | Stage::Problem);
    let Some((bytes, total)) = track.pulled else { return (done.then_some(100), String::new()) };
    let whole = total.unwrap_or(bytes).max(bytes);
    if done {
        // A small download is over before its first report.
        return (Some(100), if whole < 1000 { String::new() } else { size(whole) });
    }
    let percent = (bytes.max(0).unsigned_abs() * 100).checked_div(whole.unsigned_abs()).map(|p| p.min(99));
    (percent, format!("{} of {}", size(bytes), size(whole)))
}

fn size(bytes: i64) -> String {
    if bytes < 1_000_000 { format!("{} kB", bytes / 1000) } else { format!("{:.1} MB", bytes as f64 / 1e6) }
}

fn bar(percent: Option<u64>, width: usize, unicode: bool) -> String {
    let (full, empty) = if unicode { ("█", "░") } else { ("#", ".") };
    let filled = usize::try_from(percent.unwrap_or(0)).unwrap_or(0) * width / 100;
    full.repeat(filled.min(width)) + &empty.repeat(width.saturating_sub(filled))
}

fn down(time: Duration) -> String {
    if time.is_zero() { " ".repeat(10) } else { format!("down{:>5.1}s", time.as_secs_f64()) }
}

#[cfg(test)]
mod tests {
    use super::super::fleet::tests::pulling;
    use super::*;

    #[test]
    fn the_block_fits_the_screen() {
        let console = Console::new(true);
        let view = View::new(&console, 5, 2);
        for (columns, rows) in [(40, 12), (80, 24), (110, 30), (200, 60)] {
            let block = view.block(&pulling(), columns, rows, Instant::now());
            assert!(block.len() < rows, "{} lines on {rows} rows", block.len());
            for line in &block {
                let width: usize = line.iter().map(|s| s.text.chars().count()).sum();
                assert!(width < columns, "{width} on {columns}: {line:?}");
            }
        }
    }

    #[test]
    fn a_download_is_told_in_percent_and_bytes() {
        let fleet = pulling();
        let track = &fleet.nodes["node-1"];
        assert_eq!(progress(track, Stage::Pulling), (Some(44), "400 kB of 900 kB".into()));
        assert_eq!(progress(track, Stage::Rebooting), (Some(100), "900 kB".into()));
        assert_eq!(progress(track, Stage::Spared), (None, String::new()));
        assert_eq!(progress(&NodeTrack::default(), Stage::Waiting), (None, String::new()));
        assert_eq!(bar(Some(44), 10, false), "####......");
        assert_eq!(size(1_250_000), "1.2 MB");
    }
}
