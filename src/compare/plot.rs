//! Perplexity against bytes, as a small SVG.

use std::fmt::Write as _;

use super::Comparison;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 460.0;
/// Edges of the area that the axes span.
const LEFT: f64 = 72.0;
const RIGHT: f64 = 552.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 404.0;
/// Distance of two lines of the legend.
const LINE: f64 = 17.0;
/// Colours that people with any kind of colour vision tell apart (Okabe and Ito), then again with another marker.
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"];

/// One method's results, by bytes.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// Bytes across, perplexity upwards (logarithmic where the largest is more than four times the smallest), a line per
/// method through its fractions, and a dashed line at the original's perplexity. `title` is any text.
pub fn plot(comparison: &Comparison, title: &str) -> String {
    let series = series(comparison);
    let original = comparison.original.score.perplexity;
    let points = || series.iter().flat_map(|s| &s.points);
    let x = Axis::new(points().map(|p| p.0).chain([comparison.original.bytes as f64]), (LEFT, RIGHT), false);
    let values = || points().map(|p| p.1).chain([original]);
    let (low, high) = values().fold((f64::MAX, 0.0f64), |(l, h), v| (l.min(v), h.max(v)));
    let y = Axis::new(values(), (BOTTOM, TOP), high > 4.0 * low);

    let height = HEIGHT.max(TOP + LINE * (series.len() as f64 + 2.0));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    text(&mut svg, (LEFT, 26.0), "start", "font-size=\"15\"", title);
    for tick in x.ticks() {
        let at = x.place(tick);
        line(&mut svg, (at, TOP), (at, BOTTOM), "stroke=\"#e4e4e4\"");
        text(&mut svg, (at, BOTTOM + 18.0), "middle", "", &size(tick));
    }
    for tick in y.ticks() {
        let at = y.place(tick);
        line(&mut svg, (LEFT, at), (RIGHT, at), "stroke=\"#e4e4e4\"");
        text(&mut svg, (LEFT - 8.0, at + 4.0), "end", "", &short(tick));
    }
    line(&mut svg, (LEFT, TOP), (LEFT, BOTTOM), "stroke=\"black\"");
    line(&mut svg, (LEFT, BOTTOM), (RIGHT, BOTTOM), "stroke=\"black\"");
    let middle = f64::midpoint(TOP, BOTTOM);
    text(&mut svg, (f64::midpoint(LEFT, RIGHT), BOTTOM + 40.0), "middle", "", "size of all tensors");
    let turned = format!("transform=\"rotate(-90 20 {middle})\"");
    let scale = if y.logarithmic { "perplexity (logarithmic)" } else { "perplexity" };
    text(&mut svg, (20.0, middle), "middle", &turned, scale);

    let level = y.place(original);
    line(&mut svg, (LEFT, level), (RIGHT, level), "stroke=\"black\" stroke-dasharray=\"5 4\"");
    let mut legend = TOP + 4.0;
    line(
        &mut svg,
        (RIGHT + 16.0, legend),
        (RIGHT + 40.0, legend),
        "stroke=\"black\" stroke-dasharray=\"5 4\"",
    );
    text(&mut svg, (RIGHT + 48.0, legend + 4.0), "start", "", "original");
    for (i, Series { name, points }) in series.iter().enumerate() {
        legend += LINE;
        let colour = COLOURS[i % COLOURS.len()];
        let shape = i / COLOURS.len();
        let placed: Vec<(f64, f64)> = points.iter().map(|p| (x.place(p.0), y.place(p.1))).collect();
        for pair in placed.windows(2) {
            line(&mut svg, pair[0], pair[1], &format!("stroke=\"{colour}\" stroke-width=\"1.5\""));
        }
        for &at in &placed {
            marker(&mut svg, at, shape, colour);
        }
        marker(&mut svg, (RIGHT + 28.0, legend), shape, colour);
        text(&mut svg, (RIGHT + 48.0, legend + 4.0), "start", "", name);
    }
    svg + "</svg>\n"
}

/// The rows that have results, by method, each in the order of bytes.
fn series(comparison: &Comparison) -> Vec<Series> {
    let mut all: Vec<Series> = Vec::new();
    for row in &comparison.rows {
        let Some(measured) = &row.measured else { continue };
        let point = (measured.bytes as f64, measured.score.perplexity);
        match all.iter_mut().find(|s| s.name == row.method) {
            Some(series) => series.points.push(point),
            None => all.push(Series { name: row.method.clone(), points: vec![point] }),
        }
    }
    for series in &mut all {
        series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    all
}

/// A scale from values to places on the page.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    logarithmic: bool,
}

impl Axis {
    /// An axis over all `values`, with a little room at both ends.
    fn new(values: impl Iterator<Item = f64>, (from, to): (f64, f64), logarithmic: bool) -> Self {
        let scaled = |v: f64| if logarithmic { v.ln() } else { v };
        let (mut low, mut high) = (f64::MAX, f64::MIN);
        for value in values {
            (low, high) = (low.min(scaled(value)), high.max(scaled(value)));
        }
        let room = match high - low {
            range if range > 0.0 => 0.06 * range,
            _ => 0.5 * high.abs().max(1.0),
        };
        Axis { low: low - room, high: high + room, from, to, logarithmic }
    }

    fn place(&self, value: f64) -> f64 {
        let value = if self.logarithmic { value.ln() } else { value };
        self.from + (self.to - self.from) * (value - self.low) / (self.high - self.low)
    }

    /// Round values, at most seven on a linear scale.
    fn ticks(&self) -> Vec<f64> {
        let (low, high) =
            if self.logarithmic { (self.low.exp(), self.high.exp()) } else { (self.low, self.high) };
        if !self.logarithmic {
            let step = round_step((high - low) / 6.0);
            let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
            return (first..=last).map(|i| i as f64 * step).collect();
        }
        let decades = (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
        let digits: &[f64] = match (high / low).log10() {
            span if span > 5.0 => &[1.0],
            span if span > 1.5 => &[1.0, 2.0, 5.0],
            _ => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0],
        };
        let sparse = (decades.clone().count() / 8).max(1);
        let values = decades.step_by(sparse).flat_map(|d| digits.iter().map(move |m| m * 10f64.powi(d)));
        values.filter(|v| *v >= low && *v <= high).collect()
    }
}

/// The smallest of 1, 2, 2.5, 5 × 10ⁿ that is at least `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let digit = [1.0, 2.0, 2.5, 5.0].into_iter().find(|d| d * power >= step).unwrap_or(10.0);
    digit * power
}

/// A number in few characters.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 1e5 => format!("{value:.0e}"),
        v if v >= 100.0 || v.fract() == 0.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Bytes in few characters.
fn size(bytes: f64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let power = ((bytes.abs().max(1.0).log10() / 3.0) as usize).min(units.len() - 1);
    let scaled = (bytes / 1000f64.powi(power as i32) * 100.0).round() / 100.0;
    format!("{scaled} {}", units[power])
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), style: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(svg, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {style}/>");
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, style: &str, content: &str) {
    let content: String = content.chars().filter(|c| !c.is_control()).collect();
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ =
        writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{content}</text>");
}

fn marker(svg: &mut String, (x, y): (f64, f64), shape: usize, colour: &str) {
    let points: &[(f64, f64)] = match shape % 4 {
        0 => {
            let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>");
            return;
        }
        1 => &[(-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)],
        2 => &[(0.0, -5.0), (5.0, 4.0), (-5.0, 4.0)],
        _ => &[(0.0, -5.0), (5.0, 0.0), (0.0, 5.0), (-5.0, 0.0)],
    };
    let corners: Vec<String> = points.iter().map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy)).collect();
    let _ = writeln!(svg, "<polygon points=\"{}\" fill=\"{colour}\"/>", corners.join(" "));
}
