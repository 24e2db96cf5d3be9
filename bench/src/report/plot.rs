//! Plots as inline SVG. Colours are classes of the page's style sheet, so that a plot has a light and
//! a dark look.

use std::fmt::Write;

/// A plot as it stands in the page.
pub type Svg = String;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 28.0;
const TOP: f64 = 28.0;
const BOTTOM: f64 = 44.0;
/// Colours that the style sheet has.
const COLOURS: usize = 6;

const BAR: f64 = 18.0;
const BAR_STEP: f64 = 30.0;
const BAR_LEFT: f64 = 210.0;
const BAR_RIGHT: f64 = 90.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    Linear,
    /// Points that are not above zero are left out.
    Log,
}

#[derive(Clone, Copy, Debug)]
pub struct Axis<'a> {
    pub label: &'a str,
    pub scale: Scale,
}

#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    /// Drawn dashed: a limit, not a measurement of ours.
    pub limit: bool,
}

/// Lines through points, with a legend above.
pub fn lines(x: Axis<'_>, y: Axis<'_>, series: &[Series]) -> Svg {
    let points = || series.iter().flat_map(|s| &s.points);
    let across = Range::of(x.scale, points().map(|p| p.0));
    let up = Range::of(y.scale, points().map(|p| p.1));
    let at_x = |value| LEFT + across.place(value) * (WIDTH - LEFT - RIGHT);
    let at_y = |value| HEIGHT - BOTTOM - up.place(value) * (HEIGHT - TOP - BOTTOM);
    let mut svg = open(HEIGHT, &format!("{} over {}", y.label, x.label));
    for tick in up.ticks() {
        let (y, text) = (at_y(tick), number(tick));
        let end = WIDTH - RIGHT;
        let _ = write!(
            svg,
            "<line class='grid' x1='{LEFT}' x2='{end}' y1='{y:.1}' y2='{y:.1}'/>\
             <text class='tick' text-anchor='end' x='{:.1}' y='{:.1}'>{text}</text>",
            LEFT - 8.0,
            y + 4.0
        );
    }
    for tick in across.ticks() {
        let (x, text) = (at_x(tick), number(tick));
        let y = HEIGHT - BOTTOM + 18.0;
        let _ = write!(
            svg,
            "<text class='tick' text-anchor='middle' x='{x:.1}' y='{y:.1}'>{text}</text>"
        );
    }
    let _ = write!(
        svg,
        "<text class='axis' text-anchor='middle' x='{:.1}' y='{:.1}'>{}</text>\
         <text class='axis' text-anchor='start' x='8' y='14'>{}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 6.0,
        escape(x.label),
        escape(y.label)
    );
    for (at, one) in series.iter().enumerate() {
        let colour = at % COLOURS;
        let dashed = if one.limit { " limit" } else { "" };
        let inside = one
            .points
            .iter()
            .filter(|p| across.holds(p.0) && up.holds(p.1));
        let inside: Vec<_> = inside.collect();
        let path: Vec<_> = inside
            .iter()
            .map(|(x, y)| format!("{:.1},{:.1}", at_x(*x), at_y(*y)))
            .collect();
        let _ = write!(
            svg,
            "<polyline class='line c{colour}{dashed}' points='{}'/>",
            path.join(" ")
        );
        for (x, y) in inside {
            let (px, py) = (at_x(*x), at_y(*y));
            let text = format!("{}: {} at {}", one.name, number(*y), number(*x));
            let _ = write!(
                svg,
                "<circle class='dot f{colour}' cx='{px:.1}' cy='{py:.1}' r='3'><title>{}</title></circle>",
                escape(&text)
            );
        }
    }
    svg.push_str("</svg>");
    let names: Vec<_> = series.iter().map(|s| s.name.as_str()).collect();
    legend(&names) + &svg
}

/// One bar of several parts.
#[derive(Clone, Debug)]
pub struct Bar {
    pub label: String,
    /// As many as there are names of parts.
    pub parts: Vec<f64>,
}

/// Horizontal bars whose parts add up; the sum is written behind each of them.
pub fn bars(unit: &str, parts: &[&str], bars: &[Bar]) -> Svg {
    let sum = |bar: &Bar| bar.parts.iter().sum::<f64>();
    let longest = bars.iter().map(sum).fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - BAR_LEFT - BAR_RIGHT) / longest;
    let height = BAR_STEP * bars.len() as f64 + 8.0;
    let mut svg = open(height, &format!("bars, in {unit}"));
    for (at, bar) in bars.iter().enumerate() {
        let y = 4.0 + BAR_STEP * at as f64;
        let text_y = y + BAR - 5.0;
        let _ = write!(
            svg,
            "<text class='label' text-anchor='end' x='{:.1}' y='{text_y:.1}'>{}</text>",
            BAR_LEFT - 10.0,
            escape(&bar.label)
        );
        let mut x = BAR_LEFT;
        for (part, value) in bar.parts.iter().enumerate() {
            let width = (value * scale).max(0.0);
            let name = parts.get(part).copied().unwrap_or_default();
            let text = escape(&format!("{name}: {} {unit}", number(*value)));
            let colour = part % COLOURS;
            // A pixel of ground between parts keeps them apart where colours don't.
            let drawn = (width - 1.0).max(0.5);
            let _ = write!(
                svg,
                "<rect class='f{colour}' x='{x:.1}' y='{y:.1}' width='{drawn:.1}' height='{BAR}'>\
                 <title>{text}</title></rect>"
            );
            x += width;
        }
        let _ = write!(
            svg,
            "<text class='value' x='{:.1}' y='{text_y:.1}'>{} {}</text>",
            x + 6.0,
            number(sum(bar)),
            escape(unit)
        );
    }
    svg.push_str("</svg>");
    if parts.len() > 1 {
        legend(parts) + &svg
    } else {
        svg
    }
}

fn open(height: f64, label: &str) -> String {
    format!(
        "<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{}'>",
        escape(label)
    )
}

fn legend(names: &[&str]) -> String {
    let entry = |(at, name): (usize, &&str)| {
        format!(
            "<span><i class='b{}'></i>{}</span>",
            at % COLOURS,
            escape(name)
        )
    };
    let entries: String = names.iter().enumerate().map(entry).collect();
    format!("<p class='legend'>{entries}</p>")
}

/// What an axis spans.
#[derive(Clone, Copy, Debug)]
struct Range {
    scale: Scale,
    low: f64,
    high: f64,
}

impl Range {
    fn of(scale: Scale, values: impl Iterator<Item = f64>) -> Range {
        let shown = values.filter(|v| v.is_finite() && (scale == Scale::Linear || *v > 0.0));
        let (low, high) = shown.fold((f64::INFINITY, 0.0_f64), |(low, high), v| {
            (low.min(v), high.max(v))
        });
        match scale {
            Scale::Linear => {
                let step = step(high.max(f64::MIN_POSITIVE));
                Range {
                    scale,
                    low: 0.0,
                    high: (high / step).ceil().max(1.0) * step,
                }
            }
            Scale::Log if low.is_finite() => {
                let low = round_below(low);
                let high = round_above(high).max(low * 2.0);
                Range { scale, low, high }
            }
            Scale::Log => Range {
                scale,
                low: 1.0,
                high: 10.0,
            },
        }
    }

    fn holds(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    /// Where a value is, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).log10() / (self.high / self.low).log10(),
        }
    }

    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => {
                let step = step(self.high);
                let count = (self.high / step).round() as u32;
                (0..=count).map(|n| f64::from(n) * step).collect()
            }
            Scale::Log => {
                let decades = (self.high / self.low).log10();
                let all = ROUND.iter().take(if decades > 3.0 { 1 } else { 3 });
                let first = self.low.log10().floor() as i32;
                let last = self.high.log10().ceil() as i32;
                let at = |power: i32| all.clone().map(move |part| part * 10_f64.powi(power));
                (first..=last)
                    .flat_map(at)
                    .filter(|tick| *tick >= self.low * 0.999 && *tick <= self.high * 1.001)
                    .collect()
            }
        }
    }
}

/// Where a logarithmic axis may begin, end and be ticked.
const ROUND: [f64; 3] = [1.0, 2.0, 5.0];

/// The largest 1, 2 or 5 times a power of ten that is not above a number.
fn round_below(value: f64) -> f64 {
    let unit = 10_f64.powf(value.log10().floor());
    let fits = ROUND.iter().rev().find(|part| *part * unit <= value);
    fits.unwrap_or(&1.0) * unit
}

/// The smallest that is not below it.
fn round_above(value: f64) -> f64 {
    let unit = 10_f64.powf(value.log10().floor());
    let fits = ROUND.iter().find(|part| *part * unit >= value);
    fits.unwrap_or(&10.0) * unit
}

/// A round step that divides an axis into five parts or fewer.
fn step(high: f64) -> f64 {
    let unit = 10_f64.powf(high.log10().floor());
    let steps = [0.2, 0.25, 0.5, 1.0, 2.0];
    let fits = steps.into_iter().find(|s| high / (s * unit) <= 5.0 + 1e-9);
    fits.unwrap_or(2.0) * unit
}

/// A number as a reader wants it: 1,234; 56.7; 0.89.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 100.0 {
        let digits = format!("{:.0}", size);
        let mut text = String::new();
        for (at, digit) in digits.chars().enumerate() {
            if at > 0 && (digits.len() - at).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        return if value < 0.0 {
            format!("−{text}")
        } else {
            text
        };
    }
    let places = if size >= 10.0 { 1 } else { 2 };
    let text = format!("{value:.places$}");
    if text.contains('.') {
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    text
}

/// For text and for attributes in either kind of quotes.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            other => safe.push(other),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [
            (1234567.0, "1,234,567"),
            (123.0, "123"),
            (99.96, "100"),
            (12.34, "12.3"),
            (2.0, "2"),
            (0.891, "0.89"),
            (0.0, "0"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn axes_begin_at_zero_or_at_a_round_number() {
        let linear = Range::of(Scale::Linear, [3.0, 87.0].into_iter());
        assert_eq!((linear.low, linear.high), (0.0, 100.0));
        assert_eq!(linear.ticks(), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        let log = Range::of(Scale::Log, [0.0, 5.0, 87.0].into_iter());
        assert_eq!((log.low, log.high), (5.0, 100.0));
        assert_eq!(log.ticks(), [5.0, 10.0, 20.0, 50.0, 100.0]);
        let short = Range::of(Scale::Log, [21.0].into_iter());
        assert_eq!((short.low, short.high), (20.0, 50.0));
        let wide = Range::of(Scale::Log, [1.0, 65_536.0].into_iter());
        assert_eq!(
            (wide.low, wide.high, wide.ticks().len()),
            (1.0, 100_000.0, 6)
        );
        // Nothing to show is no reason to end.
        assert_eq!(Range::of(Scale::Log, std::iter::empty()).ticks().len(), 4);
    }

    #[test]
    fn every_point_is_drawn_and_nothing_breaks_out() {
        let axis = |label, scale| Axis { label, scale };
        let series = [Series {
            name: "<a & 'b'>".into(),
            points: vec![(1.0, 10.0), (10.0, 20.0)],
            limit: false,
        }];
        let svg = lines(
            axis("pages", Scale::Log),
            axis("µs", Scale::Linear),
            &series,
        );
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(!svg.contains("<a &"));
        assert!(!svg.contains("NaN"));
    }
}
