//! Whether a maintenance window is open, when that changes, and whether what begins now can end inside.
//!
//! # What a window is
//! A schedule (the five fields of cron) says at which local times a window opens, and the duration how long it stays
//! open, in elapsed time. Windows that overlap or touch are one. Without any window it is always open.
//!
//! # Schedules
//! `minute hour day-of-month month day-of-week`, as POSIX `crontab` and Vixie cron's `crontab(5)` have them: lists,
//! ranges, steps (`*/n`, `a-b/n`), names, 0 and 7 for Sunday, `@daily` and the like. As in Vixie cron (`entry.c`), a day
//! counts when it matches **either** day field if both are restricted, and **both** if one of them begins with `*`.
//! What is likely a mistake is refused: `5/15`, `*/90`, `22-2`, seconds, days that no month has (30 February).
//!
//! # When clocks change
//! * A schedule with fixed hours opens once for each of its local times, as RFC 5545 (3.3.5) has it: a time that is
//!   skipped counts from before the change (02:30 is then 03:30), one that is repeated counts the first time.
//! * A schedule whose hour field begins with `*` follows the clock: it opens whenever the clock shows the time, so not
//!   in a skipped hour and twice in a repeated one. This keeps `*/15 * * * *` with 15m open without a break.
//!
//! Vixie cron and cronie tell the two apart as well, since one is meant as "each day", the other as "every so often".
//!
//! # How
//! Not by libraries for cron: `jiff-cron` and `croner`, which need no chrono,
//! find one opening after another (about 1 µs each; a week of `* * * * *` has 10,080), settle clock changes in their own
//! ways, and bring syntax (seconds, `L`, `W`, `#`) that would become part of our API. What is needed here is the
//! span that a whole day of openings covers. So: openings of a day that run into each other are joined when a
//! schedule is parsed; days far from any clock change are plain arithmetic; the few others are worked out time by time.
//!
//! Time zones are those bundled with jiff: what is decided does not depend on the machine.
//! Called by [`crate::rollout`], which starts no node when it does not fit. Never reads a clock or a file.

use std::{collections::VecDeque, fmt, time::Duration};

use jiff::{
    SignedDuration, Timestamp,
    civil::{Date, Time},
    tz::{AmbiguousOffset, Offset, TimeZone, TimeZoneDatabase},
};
use osimage_crds::Window;

/// How far ahead the end of an open window is looked for. No single window is longer than a week.
const FORESIGHT: SignedDuration = SignedDuration::from_hours(8 * 24);
/// How far ahead an opening is looked for: 29 February falls on a given weekday at least this often, also across 2100.
const OPENING_HORIZON: SignedDuration = SignedDuration::from_hours(41 * 366 * 24);
/// How far ahead windows are looked for that are long enough only by touching others.
const JOINED_HORIZON: SignedDuration = SignedDuration::from_hours(5 * 366 * 24);
/// The bounds of a duration, as in the API.
const DURATIONS: std::ops::RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(7 * DAY as u64);
/// Seconds of a day without a clock change.
const DAY: i64 = 86_400;

/// Maintenance windows, parsed.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Windows(Vec<Parsed>);

/// A window that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidWindow {
    /// Which of the windows, from 0.
    pub index: usize,
    /// The field, such as `rollout.windows[1].timeZone`.
    pub field: String,
    /// What is wrong with it, and what would be right.
    pub message: String,
}

impl fmt::Display for InvalidWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

impl std::error::Error for InvalidWindow {}

/// Whether a window is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A window is open.
    Open {
        /// When the last of the windows that overlap or touch closes. `None`: not within the next eight days, or
        /// never, as when there are no windows.
        closes: Option<Timestamp>,
    },
    /// No window is open.
    Closed {
        /// When the next one opens. `None`: never again, as far as time goes.
        opens: Option<Timestamp>,
    },
}

/// Whether what begins now ends inside a window even at its worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It ends before the window closes.
    Fits,
    /// It has to wait: no window is open, or what is left of it is too short.
    Waits {
        /// When the next window opens that is long enough.
        until: Timestamp,
    },
    /// No window is ever long enough: a mistake in the configuration.
    NeverFits {
        /// The longest that windows are open without a break, found within five years.
        longest: Duration,
    },
}

impl Windows {
    /// Understands windows once, for many questions. The first one that is wrong is reported.
    pub fn parse(windows: &[Window]) -> Result<Self, InvalidWindow> {
        let parsed = windows.iter().enumerate().map(|(index, window)| {
            Parsed::new(window).map_err(|(field, message)| InvalidWindow {
                index,
                field: format!("rollout.windows[{index}].{field}"),
                message,
            })
        });
        parsed.collect::<Result<_, _>>().map(Windows)
    }

    /// Whether there are none, so that it is always open.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a window is open now, and until when; or when the next one opens.
    pub fn at(&self, now: Timestamp) -> State {
        if self.0.is_empty() {
            return State::Open { closes: None };
        }
        match self.runs(now, OPENING_HORIZON, FORESIGHT).next() {
            Some(run) if run.open <= now => State::Open { closes: run.close },
            Some(run) => State::Closed { opens: Some(run.open) },
            None => State::Closed { opens: None },
        }
    }

    /// Whether something that begins now and takes `worst_case` ends inside a window; if not, when it could.
    pub fn fits(&self, now: Timestamp, worst_case: Duration) -> Verdict {
        let worst = SignedDuration::try_from(worst_case).unwrap_or(SignedDuration::MAX);
        if self.0.is_empty() {
            return Verdict::Fits;
        }
        let alone = self.0.iter().any(|w| w.duration >= worst);
        let horizon = if alone { OPENING_HORIZON } else { JOINED_HORIZON };
        let mut longest = SignedDuration::ZERO;
        for run in self.runs(now, horizon, FORESIGHT.max(worst)) {
            let left = run.close.map_or(SignedDuration::MAX, |close| close.duration_since(run.open.max(now)));
            match (left >= worst, run.open <= now) {
                (true, true) => return Verdict::Fits,
                (true, false) => return Verdict::Waits { until: run.open },
                (false, _) => longest = longest.max(run.close.map_or(left, |close| close.duration_since(run.open))),
            }
        }
        let single = self.0.iter().map(|w| w.duration).max().unwrap_or_default();
        Verdict::NeverFits { longest: longest.max(single).unsigned_abs() }
    }

    /// The times during which windows are open, joined, from the one that is open now or is the next.
    fn runs(&self, now: Timestamp, horizon: SignedDuration, foresight: SignedDuration) -> Runs<'_> {
        let until = now.checked_add(horizon).unwrap_or(Timestamp::MAX);
        let spans = self.0.iter().map(|window| Spans::new(window, now, until)).collect();
        Runs { spans, now, foresight, ended: false }
    }
}

// ---- parsing ------------------------------------------------------------------------------------------

/// One window, understood.
#[derive(Clone, Debug, PartialEq)]
struct Parsed {
    zone: TimeZone,
    schedule: Schedule,
    duration: SignedDuration,
    /// First and last of the openings of a day that run into each other, in minutes from midnight.
    joined: Vec<(i64, i64)>,
}

/// The field at fault, and what is wrong.
type Fault = (&'static str, String);

impl Parsed {
    fn new(window: &Window) -> Result<Self, Fault> {
        let Window { schedule, duration, time_zone } = window;
        let schedule = Schedule::parse(schedule).map_err(|message| ("schedule", message))?;
        if !DURATIONS.contains(&duration.get()) {
            return Err(("duration", format!("{duration} is not from 1m to 168h (7 days)")));
        }
        let duration = SignedDuration::try_from(duration.get()).unwrap_or(SignedDuration::MAX);
        // Etc/Unknown is jiff's word for "no idea", and counts as UTC there.
        let zone = TimeZoneDatabase::bundled().get(time_zone).ok().filter(|zone| !zone.is_unknown());
        let unknown = || {
            let example = "such as UTC or Europe/Berlin";
            ("timeZone", format!("{time_zone:?} is not a name of the IANA Time Zone Database, {example}"))
        };
        let joined = schedule.joined(duration);
        Ok(Parsed { zone: zone.ok_or_else(unknown)?, schedule, duration, joined })
    }
}

/// The five fields of cron, each as a set: bit n stands for the value n.
#[derive(Clone, Debug, PartialEq)]
struct Schedule {
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    /// 0 is Sunday.
    weekdays: u64,
    /// The hour field begins with `*`: it opens whenever the clock shows the time.
    follows_clock: bool,
    /// One of the day fields begins with `*`: a day has to match both.
    both_days: bool,
}

/// One of the five fields: what people call it, its values, and the names of those, from the lowest.
struct Field {
    name: &'static str,
    low: u32,
    high: u32,
    names: &'static [&'static str],
}

const MINUTE: Field = Field { name: "minute", low: 0, high: 59, names: &[] };
const HOUR: Field = Field { name: "hour", low: 0, high: 23, names: &[] };
const DAY_OF_MONTH: Field = Field { name: "day of month", low: 1, high: 31, names: &[] };
const MONTH: Field = Field {
    name: "month",
    low: 1,
    high: 12,
    names: &["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"],
};
const DAY_OF_WEEK: Field =
    Field { name: "day of week", low: 0, high: 7, names: &["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"] };

impl Schedule {
    fn parse(text: &str) -> Result<Self, String> {
        let expanded = match text.trim() {
            "@yearly" | "@annually" => "0 0 1 1 *",
            "@monthly" => "0 0 1 * *",
            "@weekly" => "0 0 * * 0",
            "@daily" | "@midnight" => "0 0 * * *",
            "@hourly" => "0 * * * *",
            other => other,
        };
        let fields: Vec<&str> = expanded.split_ascii_whitespace().collect();
        let &[minute, hour, day, month, weekday] = fields.as_slice() else {
            return Err(format!(
                "{text:?} is not a schedule: it must have five fields (minute, hour, day of month, month, day of week), \
                 such as \"0 22 * * MON-FRI\", or be one of @hourly, @daily, @weekly, @monthly and @yearly; \
                 the time zone has a field of its own"
            ));
        };
        let weekdays = DAY_OF_WEEK.parse(weekday)?;
        let schedule = Schedule {
            minutes: MINUTE.parse(minute)?,
            hours: HOUR.parse(hour)?,
            days: DAY_OF_MONTH.parse(day)?,
            months: MONTH.parse(month)?,
            weekdays: (weekdays | weekdays >> 7) & 0b111_1111,
            follows_clock: hour.starts_with('*'),
            both_days: day.starts_with('*') || weekday.starts_with('*'),
        };
        // Every date falls on every weekday in some year, so only the day of the month can be impossible.
        let days_of = |month| match month {
            2 => 29,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        let possible = bits(schedule.months).any(|month| bits(schedule.days).any(|day| day <= days_of(month)));
        if schedule.both_days && !possible {
            return Err(format!("{text:?} never comes: no such month has a day {day}"));
        }
        Ok(schedule)
    }

    /// Openings that run into each other on a day without a clock change, in minutes from midnight.
    fn joined(&self, duration: SignedDuration) -> Vec<(i64, i64)> {
        let mut joined: Vec<(i64, i64)> = vec![];
        for (hour, minute) in self.times() {
            let at = hour * 60 + minute;
            match joined.last_mut() {
                Some((_, last)) if SignedDuration::from_mins(at - *last) <= duration => *last = at,
                Some(_) | None => joined.push((at, at)),
            }
        }
        joined
    }

    fn times(&self) -> impl Iterator<Item = (i64, i64)> {
        bits(self.hours).flat_map(|hour| bits(self.minutes).map(move |minute| (hour, minute)))
    }

    /// The first date from this one on that the schedule opens on.
    fn next_date(&self, mut date: Date, last: Date) -> Option<Date> {
        while date <= last {
            if !has(self.months, date.month()) {
                date = date.last_of_month().tomorrow().ok()?;
                continue;
            }
            let day = has(self.days, date.day());
            let weekday = has(self.weekdays, date.weekday().to_sunday_zero_offset());
            if (day && weekday) || (!self.both_days && (day || weekday)) {
                return Some(date);
            }
            date = date.tomorrow().ok()?;
        }
        None
    }
}

impl Field {
    fn parse(&self, text: &str) -> Result<u64, String> {
        text.split(',').try_fold(0, |set, item| {
            let added = self.item(item).map_err(|why| format!("{item:?} in the field {} {why}", self.name))?;
            Ok(set | added)
        })
    }

    /// `*`, `*/n`, `a`, `a-b` or `a-b/n`.
    fn item(&self, item: &str) -> Result<u64, String> {
        let (range, step) = item.split_once('/').map_or((item, None), |(range, step)| (range, Some(step)));
        let (low, high) = match range.split_once('-') {
            _ if range == "*" => (self.low, self.high),
            Some((low, high)) => (self.value(low)?, self.value(high)?),
            None if step.is_some() => {
                return Err(format!("has a step without a range: write {range}-{}/n", self.high));
            }
            None => (self.value(range)?, self.value(range)?),
        };
        // FRI-SUN: a week may end on Sunday.
        let high = if low > high && high == 0 && self.high == 7 { 7 } else { high };
        if low > high {
            return Err(format!(
                "goes down: write {range} as two ranges, such as {low}-{0},{1}-{high}",
                self.high, self.low
            ));
        }
        let most = self.high - self.low + 1;
        let step = match step.map(number) {
            None => 1,
            Some(Some(step)) if (1..=most).contains(&step) => step,
            Some(_) => return Err(format!("has a step that is not a number from 1 to {most}")),
        };
        Ok((low..=high).step_by(step as usize).fold(0, |set, value| set | 1 << value))
    }

    fn value(&self, text: &str) -> Result<u32, String> {
        let named = self.names.iter().zip(self.low..).find(|(name, _)| name.eq_ignore_ascii_case(text));
        let value = named.map(|(_, value)| value).or_else(|| number(text));
        value.filter(|value| (self.low..=self.high).contains(value)).ok_or_else(|| {
            let names = match self.names {
                [first, .., last] => format!(", or a name from {first} to {last}"),
                [] | [_] => String::new(),
            };
            format!("is not *, a number from {} to {}{names}, a range or a step", self.low, self.high)
        })
    }
}

/// One or two digits, and nothing else.
fn number(text: &str) -> Option<u32> {
    let digits = (1..=2).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| digits)
}

fn has(set: u64, value: i8) -> bool {
    u32::try_from(value).is_ok_and(|value| set >> value & 1 == 1)
}

/// The values of a set, in order.
fn bits(set: u64) -> impl Iterator<Item = i64> {
    (0..64).filter(move |value| set >> value & 1 == 1)
}

// ---- from schedules to times --------------------------------------------------------------------------

/// A time during which a window is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    open: Timestamp,
    close: Timestamp,
}

/// What one window covers by itself, day by day, in order, beginning with what may still be open at a moment.
struct Spans<'a> {
    window: &'a Parsed,
    steady: Steady,
    /// The next date to look at; `None` after the last.
    date: Option<Date>,
    last: Date,
    ready: VecDeque<Span>,
}

impl<'a> Spans<'a> {
    fn new(window: &'a Parsed, now: Timestamp, until: Timestamp) -> Self {
        let begun = now.checked_sub(window.duration).unwrap_or(Timestamp::MIN);
        // The day before as well: a time that is skipped at midnight opens on the next day.
        let date = window.zone.to_datetime(begun).date();
        let date = date.yesterday().unwrap_or(date);
        let last = window.zone.to_datetime(until).date();
        Spans { window, steady: Steady::default(), date: Some(date), last, ready: VecDeque::new() }
    }

    fn peek(&mut self) -> Option<Span> {
        while self.ready.is_empty() {
            let date = self.window.schedule.next_date(self.date?, self.last);
            self.date = date.and_then(|date| date.tomorrow().ok());
            self.day(date?);
        }
        self.ready.front().copied()
    }

    fn take(&mut self) {
        self.ready.pop_front();
    }

    /// What the openings of a date cover.
    fn day(&mut self, date: Date) {
        let Ok(midnight) = Offset::UTC.to_timestamp(date.to_datetime(Time::midnight())) else { return };
        let midnight = midnight.as_second();
        let Some(offset) = self.steady.offset(&self.window.zone, midnight) else {
            return self.day_of_change(date);
        };
        for &(first, last) in &self.window.joined {
            let at = |minutes: i64| Timestamp::from_second(midnight - offset + minutes * 60);
            if let (Ok(open), Ok(last)) = (at(first), at(last)) {
                self.ready.push_back(Span { open, close: after(last, self.window.duration) });
            }
        }
    }

    /// The same on a date near a clock change: time by time.
    fn day_of_change(&mut self, date: Date) {
        let Parsed { zone, schedule, duration, joined: _ } = self.window;
        let resolve = |hour: i8, minute: i8| zone.to_ambiguous_timestamp(date.at(hour, minute, 0, 0)).offset();
        let mut openings = vec![];
        for hour in bits(schedule.hours).filter_map(|hour| i8::try_from(hour).ok()) {
            let (first, last) = (resolve(hour, 0), resolve(hour, 59));
            for minute in bits(schedule.minutes).filter_map(|minute| i8::try_from(minute).ok()) {
                let by = |offset: Offset| offset.to_timestamp(date.at(hour, minute, 0, 0)).ok();
                match if first == last { first } else { resolve(hour, minute) } {
                    AmbiguousOffset::Unambiguous { offset } => openings.extend(by(offset)),
                    AmbiguousOffset::Gap { before, after: _ } if !schedule.follows_clock => openings.extend(by(before)),
                    AmbiguousOffset::Gap { before: _, after: _ } => {}
                    AmbiguousOffset::Fold { before, after } => {
                        openings.extend(by(before));
                        openings.extend(by(after).filter(|_| schedule.follows_clock));
                    }
                }
            }
        }
        openings.sort_unstable();
        for open in openings {
            let close = after(open, *duration);
            match self.ready.back_mut() {
                Some(span) if open <= span.close => span.close = span.close.max(close),
                Some(_) | None => self.ready.push_back(Span { open, close }),
            }
        }
    }
}

/// A stretch of time in which local times are plain arithmetic: away from clock changes by more than the clock is
/// changed, so that no local time in it is skipped or repeated. Seconds since 1970.
#[derive(Default)]
struct Steady {
    from: i64,
    until: i64,
    /// How far local time is ahead of UTC.
    offset: i64,
}

impl Steady {
    /// How far local time is ahead of UTC on the day that begins at this local midnight, if that is a steady day.
    fn offset(&mut self, zone: &TimeZone, midnight: i64) -> Option<i64> {
        if !self.covers(midnight) {
            *self = Steady::around(zone, midnight + DAY / 2)?;
        }
        self.covers(midnight).then_some(self.offset)
    }

    fn around(zone: &TimeZone, second: i64) -> Option<Steady> {
        let ahead = |second| Some(i64::from(zone.to_offset(Timestamp::from_second(second).ok()?).seconds()));
        let (here, next) = (Timestamp::from_second(second).ok()?, Timestamp::from_second(second + 1).ok()?);
        let offset = ahead(second)?;
        let from = match zone.preceding(next).next().map(|change| change.timestamp().as_second()) {
            Some(change) => change + (offset - ahead(change - 1).unwrap_or(offset)).abs(),
            None => i64::MIN,
        };
        let until = match zone.following(here).next().map(|change| change.timestamp().as_second()) {
            Some(change) => change - (offset - ahead(change).unwrap_or(offset)).abs(),
            None => i64::MAX,
        };
        Some(Steady { from, until, offset })
    }

    fn covers(&self, midnight: i64) -> bool {
        let begins = midnight - self.offset;
        self.from <= begins && begins + DAY <= self.until
    }
}

/// A time during which one window or another is open.
struct Run {
    open: Timestamp,
    /// `None` when it is beyond what was to be foreseen.
    close: Option<Timestamp>,
}

/// What all windows cover, joined, in order.
struct Runs<'a> {
    spans: Vec<Spans<'a>>,
    now: Timestamp,
    /// Runs are followed so far from their opening, or from now.
    foresight: SignedDuration,
    ended: bool,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        while !self.ended {
            let run = self.join()?;
            if run.close.is_none_or(|close| close > self.now) {
                return Some(run);
            }
        }
        None
    }
}

impl Runs<'_> {
    fn join(&mut self) -> Option<Run> {
        let Span { open, mut close } = self.spans.iter_mut().filter_map(Spans::peek).min()?;
        let foreseen = after(open.max(self.now), self.foresight);
        loop {
            let before = close;
            for spans in &mut self.spans {
                while let Some(span) = spans.peek().filter(|span| span.open <= close && close <= foreseen) {
                    close = close.max(span.close);
                    spans.take();
                }
            }
            if close > foreseen {
                self.ended = true;
                return Some(Run { open, close: None });
            }
            if close == before {
                return Some(Run { open, close: Some(close) });
            }
        }
    }
}

fn after(start: Timestamp, span: SignedDuration) -> Timestamp {
    start.checked_add(span).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {

    use osimage_crds::Period;

    use super::*;

    fn window(schedule: &str, duration: &str, zone: &str) -> Window {
        let duration = Period::try_from(duration.to_owned()).unwrap();
        Window { schedule: schedule.into(), duration, time_zone: zone.into() }
    }

    fn windows(of: &[(&str, &str, &str)]) -> Windows {
        let list: Vec<Window> = of.iter().map(|(schedule, duration, zone)| window(schedule, duration, zone)).collect();
        Windows::parse(&list).unwrap()
    }

    fn ts(text: &str) -> Timestamp {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    /// `open until T`, `open`, `closed until T` or `closed`, in UTC.
    fn said(state: State) -> String {
        match state {
            State::Open { closes: Some(at) } => format!("open until {at}"),
            State::Open { closes: None } => "open".into(),
            State::Closed { opens: Some(at) } => format!("closed until {at}"),
            State::Closed { opens: None } => "closed".into(),
        }
    }

    #[test]
    fn without_windows_it_is_always_open_and_everything_fits() {
        let none = Windows::parse(&[]).unwrap();
        assert!(none.is_empty());
        assert_eq!(none.at(ts("2026-11-26T12:00:00Z")), State::Open { closes: None });
        assert_eq!(none.fits(ts("2026-11-26T12:00:00Z"), Duration::MAX), Verdict::Fits);
    }

    #[test]
    fn open_and_closed() {
        let berlin = "Europe/Berlin";
        let new_york = "America/New_York";
        let lord_howe = "Australia/Lord_Howe";
        let night = ("0 2 * * *", "4h", "UTC");
        for (fact, of, now, expected) in [
            ("closed before it opens", vec![night], "2026-11-26T01:59:59.999Z", "closed until 2026-11-26T02:00:00Z"),
            ("open from its first moment", vec![night], "2026-11-26T02:00:00Z", "open until 2026-11-26T06:00:00Z"),
            ("open to its last", vec![night], "2026-11-26T05:59:59.999Z", "open until 2026-11-26T06:00:00Z"),
            ("closed when it closes", vec![night], "2026-11-26T06:00:00Z", "closed until 2026-11-27T02:00:00Z"),
            (
                "the schedule is in local time",
                vec![("0 2 * * *", "4h", berlin)],
                "2026-11-26T00:30:00Z",
                "closed until 2026-11-26T01:00:00Z",
            ),
            (
                "a window goes on past midnight",
                vec![("0 22 * * FRI", "8h", "UTC")],
                "2026-11-28T03:00:00Z",
                "open until 2026-11-28T06:00:00Z",
            ),
            (
                "a window of a week is open on its last day",
                vec![("0 0 1 * *", "168h", "UTC")],
                "2026-11-07T23:00:00Z",
                "open until 2026-11-08T00:00:00Z",
            ),
            (
                "a window that opens before another closes extends it",
                vec![("0 2 * * *", "2h", "UTC"), ("30 3 * * *", "1h", "UTC")],
                "2026-11-26T02:10:00Z",
                "open until 2026-11-26T04:30:00Z",
            ),
            (
                "so does one that opens when another closes, and a third, in whatever order they stand",
                vec![("0 5 * * *", "1h", "UTC"), ("0 4 * * *", "1h", "UTC"), night],
                "2026-11-26T02:10:00Z",
                "open until 2026-11-26T06:00:00Z",
            ),
            (
                "a window inside another changes nothing",
                vec![night, ("0 3 * * *", "1h", "UTC")],
                "2026-11-26T03:10:00Z",
                "open until 2026-11-26T06:00:00Z",
            ),
            (
                "windows of two time zones join",
                vec![("0 2 * * *", "1h", berlin), ("0 2 * * *", "1h", "UTC")],
                "2026-11-26T01:10:00Z",
                "open until 2026-11-26T03:00:00Z",
            ),
            ("a window without gaps does not close", vec![("* * * * *", "1m", berlin)], "2026-11-26T12:00:00Z", "open"),
            (
                "nor do two that fill each other's",
                vec![("*/2 * * * *", "1m", "UTC"), ("1-59/2 * * * *", "1m", "UTC")],
                "2026-11-26T12:00:00Z",
                "open",
            ),
            (
                "29 February comes in leap years",
                vec![("0 0 29 2 *", "24h", "UTC")],
                "2026-11-26T12:00:00Z",
                "closed until 2028-02-29T00:00:00Z",
            ),
            (
                "1900, 2100 and 2200 are none",
                vec![("0 0 29 2 *", "24h", "UTC")],
                "2096-03-01T00:00:00Z",
                "closed until 2104-02-29T00:00:00Z",
            ),
            (
                "a 29 February that is a Sunday, Tuesday, Thursday or Saturday",
                vec![("0 0 29 2 */2", "24h", "UTC")],
                "2024-03-01T00:00:00Z",
                "closed until 2028-02-29T00:00:00Z",
            ),
            (
                "no year ends before the world does",
                vec![("0 0 29 2 *", "24h", "UTC")],
                "9999-01-01T00:00:00Z",
                "closed",
            ),
            // Berlin, 2026-03-29: 02:00 CET is 03:00 CEST (01:00 UTC).
            (
                "a skipped 02:30 counts from before the change: 03:30 CEST",
                vec![("30 2 * * *", "1h", berlin)],
                "2026-03-29T00:00:00Z",
                "closed until 2026-03-29T01:30:00Z",
            ),
            (
                "and its duration is elapsed time",
                vec![("30 2 * * *", "1h", berlin)],
                "2026-03-29T02:00:00Z",
                "open until 2026-03-29T02:30:00Z",
            ),
            (
                "a window over the skipped hour is not shorter",
                vec![("0 1 * * *", "3h", berlin)],
                "2026-03-29T00:30:00Z",
                "open until 2026-03-29T03:00:00Z",
            ),
            (
                "the next day it opens at 02:30 again",
                vec![("30 2 * * *", "1h", berlin)],
                "2026-03-29T12:00:00Z",
                "closed until 2026-03-30T00:30:00Z",
            ),
            (
                "with an hour of * a skipped time does not come",
                vec![("15 */2 * * *", "10m", berlin)],
                "2026-03-29T00:30:00Z",
                "closed until 2026-03-29T02:15:00Z",
            ),
            // Berlin, 2026-10-25: 03:00 CEST is 02:00 CET (01:00 UTC).
            (
                "a repeated 02:30 counts the first time",
                vec![("30 2 * * *", "30m", berlin)],
                "2026-10-25T00:00:00Z",
                "closed until 2026-10-25T00:30:00Z",
            ),
            (
                "and not the second time",
                vec![("30 2 * * *", "30m", berlin)],
                "2026-10-25T01:30:00Z",
                "closed until 2026-10-26T01:30:00Z",
            ),
            (
                "a window over the repeated hour is not longer",
                vec![("0 1 * * *", "3h", berlin)],
                "2026-10-24T23:30:00Z",
                "open until 2026-10-25T02:00:00Z",
            ),
            (
                "with an hour of * a repeated time comes twice",
                vec![("30 * * * *", "5m", berlin)],
                "2026-10-25T00:40:00Z",
                "closed until 2026-10-25T01:30:00Z",
            ),
            (
                "so that what has no gaps has none then",
                vec![("*/15 * * * *", "15m", berlin)],
                "2026-10-24T12:00:00Z",
                "open",
            ),
            (
                "24 hours each midnight leave out the 25th hour",
                vec![("0 0 * * *", "24h", berlin)],
                "2026-10-24T12:00:00Z",
                "open until 2026-10-25T22:00:00Z",
            ),
            // New York, 2026-03-08 at 07:00 UTC and 2026-11-01 at 06:00 UTC.
            (
                "New York, skipped: 02:30 is 03:30 EDT",
                vec![("30 2 * * SUN", "2h", new_york)],
                "2026-03-08T00:00:00Z",
                "closed until 2026-03-08T07:30:00Z",
            ),
            (
                "New York, repeated: 01:30 is 01:30 EDT",
                vec![("30 1 * * SUN", "2h", new_york)],
                "2026-11-01T06:00:00Z",
                "open until 2026-11-01T07:30:00Z",
            ),
            // Lord Howe: 2026-10-04 02:00 (+10:30) is 02:30 (+11); 2026-04-05 02:00 (+11) is 01:30 (+10:30).
            (
                "Lord Howe, skipped by half an hour: 02:15 is 02:45",
                vec![("15 2 * * *", "1h", lord_howe)],
                "2026-10-03T15:00:00Z",
                "closed until 2026-10-03T15:45:00Z",
            ),
            (
                "Lord Howe: 02:30 is not skipped",
                vec![("30 2 * * *", "1h", lord_howe)],
                "2026-10-03T15:00:00Z",
                "closed until 2026-10-03T15:30:00Z",
            ),
            (
                "Lord Howe, repeated: 01:45 counts the first time",
                vec![("45 1 * * *", "10m", lord_howe)],
                "2026-04-04T14:00:00Z",
                "closed until 2026-04-04T14:45:00Z",
            ),
            (
                "Lord Howe: 01:45 comes again for an hour of *",
                vec![("45 * * * *", "10m", lord_howe)],
                "2026-04-04T15:00:00Z",
                "closed until 2026-04-04T15:15:00Z",
            ),
            // Cairo, 2026-04-24: midnight is skipped (22:00 UTC on the 23rd).
            (
                "a midnight that is skipped opens in the first hour",
                vec![("30 0 * * FRI", "1h", "Africa/Cairo")],
                "2026-04-23T12:00:00Z",
                "closed until 2026-04-23T22:30:00Z",
            ),
        ] {
            assert_eq!(said(windows(&of).at(ts(now))), expected, "{fact}");
        }
    }

    #[test]
    fn what_fits() {
        let night = ("0 2 * * *", "1h", "UTC");
        let until = |text| Verdict::Waits { until: ts(text) };
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        for (fact, of, now, minutes, expected) in [
            ("what ends with the window fits", vec![night], "2026-11-26T02:30:00Z", 30, Verdict::Fits),
            (
                "what ends later waits for the next one",
                vec![night],
                "2026-11-26T02:30:00.001Z",
                30,
                until("2026-11-27T02:00:00Z"),
            ),
            ("what needs all of it waits", vec![night], "2026-11-26T01:00:00Z", 60, until("2026-11-26T02:00:00Z")),
            (
                "what needs more never fits",
                vec![night],
                "2026-11-26T02:00:00Z",
                61,
                Verdict::NeverFits { longest: hours(1) },
            ),
            (
                "windows that are too short are passed over",
                vec![night, ("0 0 1 1 *", "6h", "UTC")],
                "2026-11-26T02:00:00Z",
                120,
                until("2027-01-01T00:00:00Z"),
            ),
            (
                "windows that touch count as one",
                vec![night, ("0 3 * * SAT", "1h", "UTC")],
                "2026-11-26T02:00:00Z",
                120,
                until("2026-11-28T02:00:00Z"),
            ),
            (
                "also those that seldom do",
                vec![("0 0 29 2 *", "24h", "UTC"), ("0 0 1 3 *", "24h", "UTC")],
                "2026-11-26T02:00:00Z",
                48 * 60,
                until("2028-02-29T00:00:00Z"),
            ),
            (
                "the longest without a break is told",
                vec![night, ("0 3 * * SAT", "1h", "UTC")],
                "2026-11-26T02:00:00Z",
                121,
                Verdict::NeverFits { longest: hours(2) },
            ),
            (
                "a window that comes once in decades is waited for",
                vec![("0 0 29 2 */7", "24h", "UTC")],
                "2088-03-01T00:00:00Z",
                60,
                until("2128-02-29T00:00:00Z"),
            ),
            (
                "what never closes is long enough",
                vec![("* * * * *", "1m", "UTC")],
                "2026-11-26T02:00:00Z",
                90_000,
                Verdict::Fits,
            ),
        ] {
            let worst = Duration::from_secs(minutes * 60);
            assert_eq!(windows(&of).fits(ts(now), worst), expected, "{fact}");
        }
    }

    #[test]
    fn schedules_that_say_the_same() {
        for (one, other) in [
            ("@hourly", "0 * * * *"),
            ("@daily", "0 0 * * *"),
            ("@midnight", "@daily"),
            ("@weekly", "0 0 * * SUN"),
            ("@monthly", "0 0 1 * *"),
            ("@yearly", "0 0 1 JAN *"),
            ("@annually", "@yearly"),
            ("0 0 * * 7", "0 0 * * 0"),
            ("0 0 * * FRI-SUN", "0 0 * * 0,5,6"),
            ("0 0 * * 5-7", "0 0 * * sun,fri,sat"),
            ("0 0 * * Mon-Fri", "0 0 * * 1-5"),
            ("0 0 * jan,Mar-MAY *", "0 0 * 1,3,4,5 *"),
            ("*/15 0 * * *", "0,15,30,45 0 * * *"),
            ("10-40/15 0 * * *", "10,25,40 0 * * *"),
            ("5,1-3,2 0 * * *", "1,2,3,5 0 * * *"),
            ("00 08 01 01 *", "0 8 1 1 *"),
            ("  0\t0   * * * ", "0 0 * * *"),
        ] {
            assert_eq!(Schedule::parse(one), Schedule::parse(other), "{one} and {other}");
        }
    }

    #[test]
    fn both_day_fields_or_either() {
        // 2026-11: the 1st and the 15th are Sundays, the 16th is a Monday.
        for (fact, schedule, days) in [
            ("each restricted: either", "0 0 15 11 MON", "2,9,15,16,23,30"),
            ("day of week is *: day of month", "0 0 15 11 *", "15"),
            ("day of month is *: day of week", "0 0 * 11 MON", "2,9,16,23,30"),
            ("begins with *: both", "0 0 */15 11 MON", "16"),
            ("begins with *: both", "0 0 15,16 11 */2", "15"),
            (
                "a range of all is no *",
                "0 0 1-31 11 MON",
                &(1..=30).map(|d| d.to_string()).collect::<Vec<_>>().join(","),
            ),
        ] {
            let schedule = Schedule::parse(schedule).unwrap();
            let (mut date, last) = (Date::constant(2026, 11, 1), Date::constant(2026, 11, 30));
            let mut found = vec![];
            while let Some(at) = schedule.next_date(date, last) {
                found.push(at.day().to_string());
                date = at.tomorrow().unwrap();
            }
            assert_eq!(found.join(","), days, "{fact}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_field() {
        let good = window("0 2 * * *", "1h", "UTC");
        for (bad, expected) in [
            (("0 0 30 2 *", "1h", "UTC"), "schedule: \"0 0 30 2 *\" never comes: no such month has a day 30"),
            (("0 0 31 4,6 *", "1h", "UTC"), "schedule: \"0 0 31 4,6 *\" never comes: no such month has a day 31"),
            (
                ("60 0 * * *", "1h", "UTC"),
                "schedule: \"60\" in the field minute is not *, a number from 0 to 59, a range or a step",
            ),
            (
                ("0 24 * * *", "1h", "UTC"),
                "schedule: \"24\" in the field hour is not *, a number from 0 to 23, a range or a step",
            ),
            (
                ("0 0 0 * *", "1h", "UTC"),
                "schedule: \"0\" in the field day of month is not *, a number from 1 to 31, a range or a step",
            ),
            (
                ("0 0 * 13 *", "1h", "UTC"),
                "schedule: \"13\" in the field month is not *, a number from 1 to 12, or a name from JAN to DEC, a range or a step",
            ),
            (
                ("0 0 * * MO", "1h", "UTC"),
                "schedule: \"MO\" in the field day of week is not *, a number from 0 to 7, or a name from SUN to SAT, a range or a step",
            ),
            (
                ("0 22-2 * * *", "1h", "UTC"),
                "schedule: \"22-2\" in the field hour goes down: write 22-2 as two ranges, such as 22-23,0-2",
            ),
            (
                ("5/15 0 * * *", "1h", "UTC"),
                "schedule: \"5/15\" in the field minute has a step without a range: write 5-59/n",
            ),
            (
                ("*/0 0 * * *", "1h", "UTC"),
                "schedule: \"*/0\" in the field minute has a step that is not a number from 1 to 60",
            ),
            (
                ("*/90 0 * * *", "1h", "UTC"),
                "schedule: \"*/90\" in the field minute has a step that is not a number from 1 to 60",
            ),
            (("0 0 * * *", "59s", "UTC"), "duration: 59s is not from 1m to 168h (7 days)"),
            (("0 0 * * *", "169h", "UTC"), "duration: 169h is not from 1m to 168h (7 days)"),
            (
                ("0 0 * * *", "1h", "Mars/Phobos"),
                "timeZone: \"Mars/Phobos\" is not a name of the IANA Time Zone Database, such as UTC or Europe/Berlin",
            ),
        ] {
            let error = Windows::parse(&[good.clone(), window(bad.0, bad.1, bad.2)]).unwrap_err();
            assert_eq!(error.to_string(), format!("rollout.windows[1].{expected}"));
            assert_eq!(error.index, 1);
        }
    }

    #[test]
    fn garbage_is_refused_and_nothing_panics() {
        for bad in [
            "",
            " ",
            "*",
            "* * * *",
            "* * * * * *",
            "0 0 0 2 * *",
            "@reboot",
            "@DAILY",
            "@",
            "TZ=UTC 0 0 * * *",
            "a b c d e",
            ", * * * *",
            "1,, * * * *",
            "- * * * *",
            "1- * * * *",
            "-1 * * * *",
            "1-2-3 * * * *",
            "/ * * * *",
            "*/ * * * *",
            "*/-1 * * * *",
            "*/1/2 * * * *",
            "+1 * * * *",
            "** * * * *",
            "*-5 * * * *",
            "? * * * *",
            "0 0 L * *",
            "0 0 1W * *",
            "0 0 * * 1#2",
            "0 0 * * 8",
            "001 * * * *",
            "99999999999 * * * *",
            "é * * * *",
            "1-é * * * *",
            "0 0 * JANUARY *",
        ] {
            assert!(Schedule::parse(bad).is_err(), "{bad}");
        }
        for zone in ["", " ", "Etc/Unknown", "+01:00", "Local", "../Berlin", "Europe", "EUROPE/BERLINE", "é"] {
            assert!(Windows::parse(&[window("0 0 * * *", "1h", zone)]).is_err(), "{zone}");
        }
        let pieces = ["*", "/", "-", ",", " ", "0", "7", "31", "59", "MON", "DEC", "é", "@daily"];
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..50_000 {
            let text: String = (0..random.usize(0..16)).map(|_| pieces[random.usize(0..pieces.len())]).collect();
            if let Ok(windows) = Windows::parse(&[window(&text, "2h", "Europe/Berlin")]) {
                for now in ["2026-03-29T00:00:00Z", "-009999-01-03T00:00:00Z", "9999-12-30T00:00:00Z"] {
                    let _ = windows.at(ts(now));
                }
            }
        }
        for now in [Timestamp::MIN, Timestamp::MAX] {
            let all = windows(&[("* * * * *", "168h", "Europe/Berlin"), ("0 0 29 2 *", "1h", "Asia/Tokyo")]);
            let _ = all.at(now);
            for worst in [Duration::ZERO, Duration::from_secs(3600), Duration::MAX] {
                let _ = all.fits(now, worst);
            }
        }
    }

    // ---- against a scan of every minute ---------------------------------------------------------------

    /// A random field as text, and the values it stands for, found another way than by the parser.
    fn random_field(random: &mut fastrand::Rng, low: usize, high: usize, star: f32) -> (String, Vec<bool>) {
        let mut set = vec![false; 64];
        if random.f32() < star {
            set[low..=high].fill(true);
            return ("*".into(), set);
        }
        let items: Vec<String> = (0..random.usize(1..=3))
            .map(|_| {
                let (a, b, step) =
                    (random.usize(low..=high), random.usize(low..=high), random.usize(1..=12.min(high - low)));
                let (a, b) = (a.min(b), a.max(b));
                match random.u8(0..4) {
                    0 => {
                        (a..=b).for_each(|n| set[n] = true);
                        format!("{a}-{b}")
                    }
                    1 => {
                        (a..=b).filter(|n| (n - a) % step == 0).for_each(|n| set[n] = true);
                        format!("{a}-{b}/{step}")
                    }
                    2 if random.bool() => {
                        (low..=high).filter(|n| (n - low).is_multiple_of(step)).for_each(|n| set[n] = true);
                        format!("*/{step}")
                    }
                    _ => {
                        set[a] = true;
                        a.to_string()
                    }
                }
            })
            .collect();
        (items.join(","), set)
    }

    /// What a schedule stands for, as plainly as can be.
    struct Plain {
        text: String,
        fields: [Vec<bool>; 5],
        follows_clock: bool,
        both_days: bool,
        minutes_open: i64,
    }

    impl Plain {
        fn random(random: &mut fastrand::Rng) -> Plain {
            let (minute, minutes) = random_field(random, 0, 59, 0.1);
            let (hour, hours) = random_field(random, 0, 23, 0.3);
            let (day, days) = random_field(random, 1, 31, 0.6);
            let (month, months) = random_field(random, 1, 12, 0.8);
            let (weekday, weekdays) = random_field(random, 0, 6, 0.6);
            let minutes_open = match random.u8(0..4) {
                0 => random.i64(1..=10),
                1 | 2 => random.i64(10..=300),
                _ => random.i64(300..=7 * 24 * 60),
            };
            let text = format!("{minute} {hour} {day} {month} {weekday}");
            let follows_clock = hour.starts_with('*');
            let both_days = day.starts_with('*') || weekday.starts_with('*');
            Plain { text, fields: [minutes, hours, days, months, weekdays], follows_clock, both_days, minutes_open }
        }

        fn matches(&self, local: jiff::civil::DateTime) -> bool {
            let [minutes, hours, days, months, weekdays] = &self.fields;
            let has = |set: &[bool], n: i8| set[usize::try_from(n).unwrap()];
            let day = has(days, local.day());
            let weekday = has(weekdays, local.weekday().to_sunday_zero_offset());
            has(minutes, local.minute())
                && has(hours, local.hour())
                && has(months, local.month())
                && if self.both_days { day && weekday } else { day || weekday }
        }

        /// Adds the minutes, counted from `start`, at which a window is open, walking along the clock.
        fn mark(&self, zone: &TimeZone, start: Timestamp, open: &mut [bool]) {
            let follows_clock = self.follows_clock;
            let minute = SignedDuration::from_mins(1);
            let count = i64::try_from(open.len()).unwrap();
            let mut previous = zone.to_datetime(start - minute);
            let mut latest = previous;
            let mut opens = |at: i64| {
                (at..(at + self.minutes_open).min(count)).for_each(|m| open[usize::try_from(m).unwrap()] = true)
            };
            for at in 0..count {
                let local = zone.to_datetime(start + minute * i32::try_from(at).unwrap());
                let mut skipped = previous + minute;
                let mut late = at;
                while skipped < local {
                    if !follows_clock && self.matches(skipped) {
                        opens(late);
                    }
                    skipped += minute;
                    late += 1;
                }
                if self.matches(local) && (follows_clock || local > latest) {
                    opens(at);
                }
                previous = local;
                latest = latest.max(local);
            }
        }
    }

    #[test]
    fn agrees_with_a_scan_of_every_minute_around_clock_changes() {
        const DAYS_BEFORE: i64 = 9;
        const DAYS: i64 = 18;
        let changes = [
            ("Europe/Berlin", "2026-03-29T01:00:00Z"),
            ("Europe/Berlin", "2026-10-25T01:00:00Z"),
            ("Europe/Berlin", "2051-10-29T01:00:00Z"),
            ("America/New_York", "2026-03-08T07:00:00Z"),
            ("America/New_York", "2026-11-01T06:00:00Z"),
            ("Australia/Lord_Howe", "2026-10-03T15:30:00Z"),
            ("Australia/Lord_Howe", "2026-04-04T15:00:00Z"),
            ("Africa/Cairo", "2026-04-23T22:00:00Z"),     // skips 00:00 to 01:00
            ("Africa/Cairo", "2026-10-29T21:00:00Z"),     // repeats 23:00 to 24:00 of the day before
            ("America/Havana", "2026-11-01T05:00:00Z"),   // repeats 00:00 to 01:00
            ("Antarctica/Troll", "2026-03-29T01:00:00Z"), // by two hours
            ("Antarctica/Troll", "2026-10-25T01:00:00Z"),
            ("Asia/Kathmandu", "2026-02-28T00:00:00Z"), // +05:45, no changes
            ("UTC", "2028-02-28T00:00:00Z"),
        ];
        let mut random = fastrand::Rng::with_seed(3);
        let mut compared = 0;
        for round in 0..140 {
            let (zone, change) = changes[round % changes.len()];
            let start = ts(change) - SignedDuration::from_hours(24 * DAYS_BEFORE);
            let mut open = vec![false; usize::try_from((DAYS_BEFORE + DAYS) * 24 * 60).unwrap()];
            let mut list = vec![];
            for nth in 0..random.usize(1..=3) {
                let plain = Plain::random(&mut random);
                let zone = if nth == 2 { "America/New_York" } else { zone };
                let duration = format!("{}m", plain.minutes_open);
                let window = window(&plain.text, &duration, zone);
                if Windows::parse(std::slice::from_ref(&window)).is_ok() {
                    plain.mark(&TimeZoneDatabase::bundled().get(zone).unwrap(), start, &mut open);
                    list.push(window);
                }
            }
            if list.is_empty() {
                continue;
            }
            let windows = Windows::parse(&list).unwrap();
            // The first week of the scan does not know what opened before it.
            for _ in 0..60 {
                let at = random.usize(8 * 24 * 60..(DAYS_BEFORE as usize + 9) * 24 * 60);
                let now = start + SignedDuration::from_mins(i64::try_from(at).unwrap());
                let next = open[at..]
                    .iter()
                    .position(|o| *o != open[at])
                    .map(|n| now + SignedDuration::from_mins(i64::try_from(n).unwrap()));
                let seconds = SignedDuration::from_secs(random.i64(0..60));
                let state = windows.at(now + seconds);
                let foreseen = next.filter(|next| *next <= now + seconds + FORESIGHT);
                let agree = match state {
                    State::Open { closes: Some(closes) } => open[at] && foreseen == Some(closes),
                    State::Open { closes: None } => open[at] && foreseen.is_none(),
                    State::Closed { opens } => {
                        let end = start + SignedDuration::from_hours(24 * (DAYS_BEFORE + DAYS));
                        !open[at] && opens.filter(|opens| *opens < end) == next
                    }
                };
                assert!(
                    agree,
                    "round {round}: {list:?} at {now} is {state:?}, but a scan says {} until {next:?}",
                    open[at]
                );
                compared += 1;
            }
        }
        assert!(compared > 6_000, "{compared}");
    }

    #[test]
    fn fits_is_what_at_says() {
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..2_000 {
            let plain = Plain::random(&mut random);
            let Ok(windows) =
                Windows::parse(&[window(&plain.text, &format!("{}m", plain.minutes_open), "Europe/Berlin")])
            else {
                continue;
            };
            let now = ts("2026-03-20T00:00:00Z") + SignedDuration::from_mins(random.i64(0..15 * 24 * 60));
            let worst = SignedDuration::from_mins(random.i64(1..8 * 60));
            let enough = |from: Timestamp| match windows.at(from) {
                State::Open { closes } => closes.is_none_or(|closes| from + worst <= closes),
                State::Closed { .. } => false,
            };
            match windows.fits(now, worst.unsigned_abs()) {
                Verdict::Fits => assert!(enough(now), "{} at {now} for {worst}", plain.text),
                Verdict::Waits { until } => {
                    assert!(!enough(now) && until > now && enough(until), "{} at {now} for {worst}", plain.text);
                }
                Verdict::NeverFits { longest } => {
                    assert!(!enough(now) && longest < worst.unsigned_abs(), "{} at {now} for {worst}", plain.text);
                }
            }
        }
    }
}
