//! Pictures of latency as SVG, readable in black and white.

use std::ops::Range;

use plotters::{
    coord::{
        Shift,
        ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter},
    },
    element::DashedPathElement,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

/// One line of a picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// What it is.
    pub name: String,
    /// In ascending order of x. A point that cannot be drawn (not a number; not above 0 on a log axis) is a gap.
    pub points: Vec<(f64, f64)>,
}

/// A straight line through the whole picture: a bound.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// What it is, with its value.
    pub name: String,
    /// Where.
    pub at: f64,
}

/// What one axis shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    /// What, with its unit.
    pub label: String,
    /// Whether equal ratios are equally long.
    pub log: bool,
    /// From where to where; absent: as far as the points and marks go.
    pub range: Option<(f64, f64)>,
}

impl Axis {
    /// Equal differences are equally long.
    pub fn linear(label: impl Into<String>) -> Self {
        Self { label: label.into(), log: false, range: None }
    }

    /// Equal ratios are equally long.
    pub fn log(label: impl Into<String>) -> Self {
        Self { label: label.into(), log: true, range: None }
    }

    /// With this range.
    #[must_use]
    pub fn over(mut self, from: f64, to: f64) -> Self {
        self.range = Some((from, to));
        self
    }

    fn can_show(&self, value: f64) -> bool {
        value.is_finite() && value.abs() < 1e150 && (!self.log || value > 1e-150)
    }

    /// For these values, with room for so many labels.
    fn scale(&self, values: impl Iterator<Item = f64>, labels: u32) -> Scale {
        let (low, high) = self.range.unwrap_or_else(|| {
            values
                .filter(|&value| self.can_show(value))
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
        });
        let (low, high) = if low <= high { (low, high) } else { (1.0, 10.0) };
        let exact = self.range.is_some();
        if self.log { log_scale(low, high, exact, labels) } else { linear_scale(low, high, exact) }
    }
}

/// An axis from where to where, and where it has labels.
#[derive(Clone)]
struct Scale {
    from: f64,
    to: f64,
    log: bool,
    ticks: Vec<f64>,
}

impl Scale {
    /// Where a value lies, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        if self.log {
            (value / self.from).log10() / (self.to / self.from).log10()
        } else {
            (value - self.from) / (self.to - self.from)
        }
    }

    fn contains(&self, value: f64) -> bool {
        (-1e-9..=1.0 + 1e-9).contains(&self.place(value))
    }
}

impl Ranged for Scale {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        first + (self.place(*value) * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.from..self.to
    }
}

impl ValueFormatter<f64> for Scale {
    fn format_ext(&self, value: &f64) -> String {
        plain(*value)
    }
}

/// From and to numbers that begin with 1, 2 or 5, unless they are `exact`.
fn log_scale(low: f64, high: f64, exact: bool, labels: u32) -> Scale {
    let steps = || {
        let first = low.log10().floor() as i32 - 1;
        let last = high.log10().ceil() as i32 + 1;
        (first..=last).flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(decade)))
    };
    let (mut from, mut to) = (low, high);
    if !exact {
        from = steps().take_while(|&step| step <= low * 1.000_001).last().unwrap_or(low);
        to = steps().find(|&step| step >= high * 0.999_999).unwrap_or(high);
    }
    if to < from * 1.9 {
        (from, to) = (from / 2.0, to * 2.0);
    }
    let decades = (to / from).log10();
    let stride = (decades / f64::from(labels.min(11))).ceil().max(1.0) as i32;
    let wanted = |step: f64| {
        let digits = step.log10();
        let decade = (digits - digits.round()).abs() < 1e-9 && (digits.round() as i32).rem_euclid(stride) == 0;
        decade || decades * 3.0 + 1.0 <= f64::from(labels.min(11))
    };
    let inside = |step: &f64| (from * 0.999_999..=to * 1.000_001).contains(step);
    let ticks = steps().filter(inside).filter(|&step| wanted(step)).collect();
    Scale { from, to, log: true, ticks }
}

/// From 0, if that is not far, to a round number, unless they are `exact`.
fn linear_scale(low: f64, high: f64, exact: bool) -> Scale {
    let (mut from, mut to) = (low, high);
    if !exact && from > 0.0 && from < to * 0.6 {
        from = 0.0;
    }
    if to - from <= (to.abs() + from.abs()) * 1e-9 {
        let around = (to.abs() * 0.1).max(1.0);
        (from, to) = (from - around, to + around);
    }
    let rough = (to - from) / 7.0;
    let magnitude = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0].into_iter().find(|digit| digit * magnitude >= rough).unwrap_or(10.0) * magnitude;
    if !exact {
        (from, to) = ((from / step).floor() * step, (to / step).ceil() * step);
    }
    let first = (from / step - 1e-6).ceil();
    let ticks = (0..20).map(|n| (first + f64::from(n)) * step).take_while(|&tick| tick <= to + step * 1e-6).collect();
    Scale { from, to, log: false, ticks }
}

/// Lines over two axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Above it.
    pub title: String,
    /// What it shows, for those who cannot see it.
    pub description: String,
    /// Across.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// The lines, in the order of the legend.
    pub curves: Vec<Curve>,
    /// Upright lines.
    pub upright: Vec<Mark>,
    /// Lines across.
    pub across: Vec<Mark>,
    /// Moments, as short strokes at the foot: their name in the legend, and where they are.
    pub moments: Option<(String, Vec<f64>)>,
    /// Where points of curves are shown as such.
    pub dots: Dots,
    /// Pixels across and down of what the axes enclose, about.
    pub size: (u32, u32),
}

/// Where points of curves are shown as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dots {
    /// Nowhere.
    None,
    /// At the end of a curve: the largest sample of a distribution.
    Last,
    /// Everywhere.
    All,
}

struct Style {
    colour: RGBColor,
    width: u32,
    /// Length and gap of the dashes, pixels; `None` for a solid line.
    dash: Option<(u32, u32)>,
}

/// Told apart by width and dashes, not by colour alone.
const STYLES: [Style; 8] = [
    Style { colour: RGBColor(110, 110, 110), width: 1, dash: None },
    Style { colour: RGBColor(200, 60, 20), width: 2, dash: Some((10, 5)) },
    Style { colour: RGBColor(0, 90, 180), width: 3, dash: None },
    Style { colour: RGBColor(150, 100, 0), width: 2, dash: Some((3, 4)) },
    Style { colour: RGBColor(0, 130, 90), width: 3, dash: Some((14, 4)) },
    Style { colour: RGBColor(120, 0, 120), width: 1, dash: Some((8, 3)) },
    Style { colour: RGBColor(0, 0, 0), width: 1, dash: Some((2, 2)) },
    Style { colour: RGBColor(60, 60, 60), width: 4, dash: Some((4, 6)) },
];

/// How many curves can be told apart by their lines. More of them get numbers.
pub const DISTINCT: usize = STYLES.len();

/// What is around the plot, pixels.
const MARGIN: u32 = 16;
const CAPTION: u32 = 36;
const X_LABELS: u32 = 48;
const Y_LABELS: u32 = 84;

const LEGEND_LINE: i32 = 34;
const LEGEND_TEXT: i32 = LEGEND_LINE + 8;
/// Characters in a line of the legend; longer names take two.
const LEGEND_WRAP: usize = 30;
const LINE_HEIGHT: i32 = 17;
/// Of the legend's letters, on average and generously.
const LETTER: f64 = 6.9;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;
type Pixel = (i32, i32);

impl Picture {
    /// Lines over these axes, without marks.
    pub fn new(title: impl Into<String>, x: Axis, y: Axis, curves: Vec<Curve>) -> Self {
        Self {
            title: title.into(),
            description: String::new(),
            x,
            y,
            curves,
            upright: Vec::new(),
            across: Vec::new(),
            moments: None,
            dots: Dots::None,
            size: (670, 450),
        }
    }

    /// Complementary distributions on two log axes: curves of (ns, share of samples above), and bounds (name, ns).
    /// `sample` says what a sample is; the unit follows from the times.
    pub fn ccdf(title: &str, sample: &str, share: &str, curves: Vec<Curve>, bounds: &[(String, f64)]) -> Self {
        let times = || curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.0));
        let lowest = curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.1));
        let lowest = lowest.filter(|&share| share > 1e-12).fold(0.1, f64::min);
        let unit = Unit::of(times().chain(bounds.iter().map(|bound| bound.1)));
        let upright = bounds
            .iter()
            .map(|(name, ns)| Mark { name: format!("{name} {}", unit.show(*ns)), at: unit.scaled(*ns) })
            .collect();
        let curves = curves
            .into_iter()
            .map(|curve| Curve {
                name: curve.name,
                // The axis has no place for zero; a clock that did not tick between two readings was quick.
                points: curve.points.iter().map(|&(ns, share)| (unit.scaled(ns.max(1.0)), share)).collect(),
            })
            .collect();
        let y = Axis::log(share).over(10f64.powf((lowest * 1.000_001).log10().floor()), 1.0);
        Self {
            upright,
            dots: Dots::Last,
            ..Self::new(title, Axis::log(format!("{sample}, {}", unit.name())), y, curves)
        }
    }

    /// The picture.
    pub fn svg(&self) -> String {
        let legend = Legend::of(self);
        let size = (
            self.size.0 + Y_LABELS + 2 * MARGIN + legend.width as u32,
            (self.size.1 + X_LABELS + CAPTION + 2 * MARGIN).max(legend.height as u32 + CAPTION + 2 * MARGIN),
        );
        drawn(size, &self.title, &self.description, |area| self.draw(area, &legend))
    }

    fn draw(&self, area: &Area<'_>, legend: &Legend) -> Drawn {
        let points = || self.curves.iter().flat_map(|curve| curve.points.iter()).filter(|point| self.can_show(**point));
        let moments = self.moments.iter().flat_map(|(_, at)| at.iter().copied());
        let xs = points().map(|point| point.0).chain(self.upright.iter().map(|mark| mark.at)).chain(moments);
        let ys = points().map(|point| point.1).chain(self.across.iter().map(|mark| mark.at));
        let (x, y) = (self.x.scale(xs, self.size.0 / 48), self.y.scale(ys, self.size.1 / 24));
        let mut chart = ChartBuilder::on(area)
            .margin(MARGIN)
            .margin_top(MARGIN + CAPTION)
            .margin_right(MARGIN + legend.width as u32)
            .x_label_area_size(X_LABELS)
            .y_label_area_size(Y_LABELS)
            .build_cartesian_2d(x.clone(), y.clone())?;
        chart
            .configure_mesh()
            .x_desc(clean(&self.x.label))
            .y_desc(clean(&self.y.label))
            .bold_line_style(RGBColor(215, 215, 215))
            .light_line_style(WHITE)
            .axis_desc_style(("sans-serif", 16))
            .label_style(("sans-serif", 14))
            .draw()?;

        let inside = |point: &(f64, f64)| self.can_show(*point) && x.contains(point.0) && y.contains(point.1);
        let pixel = |point: &(f64, f64)| chart.backend_coord(point);
        // The last ones first: where they lie on each other, dashes show what is below.
        for (index, curve) in self.curves.iter().enumerate().rev() {
            let parts = curve.points.split(|point| !inside(point)).filter(|part| !part.is_empty());
            let parts: Vec<Vec<Pixel>> = parts.map(|part| thinned(part.iter().map(pixel))).collect();
            self.draw_curve(area, index, &parts)?;
        }
        let (across, down) = chart.plotting_area().get_pixel_range();
        let plot = Plot { left: across.start, right: across.end, top: down.start, bottom: down.end };
        for &moment in self.moments.iter().flat_map(|(_, at)| at) {
            if inside(&(moment, y.from)) {
                let at = chart.backend_coord(&(moment, y.from)).0;
                area.draw(&PathElement::new([(at, plot.bottom - 12), (at, plot.bottom)], BLACK.stroke_width(2)))?;
            }
        }
        let uprights = self.upright.iter().filter(|mark| inside(&(mark.at, y.from)));
        for (index, mark) in uprights.enumerate() {
            let at = chart.backend_coord(&(mark.at, y.from)).0;
            plot.upright(area, at, index as i32, &mark.name)?;
        }
        for mark in self.across.iter().filter(|mark| inside(&(x.from, mark.at))) {
            plot.across(area, chart.backend_coord(&(x.from, mark.at)).1, &mark.name)?;
        }
        if self.curves.iter().all(|curve| !curve.points.iter().any(inside)) {
            let middle = (i32::midpoint(plot.left, plot.right), i32::midpoint(plot.top, plot.bottom));
            text(area, "no samples", middle, 18, HPos::Center)?;
        }
        text(area, &self.title, (MARGIN as i32 + Y_LABELS as i32, MARGIN as i32 + 8), 20, HPos::Left)?;
        legend.draw(area, (plot.right + 18, plot.top + 10))?;
        area.present()
    }

    fn can_show(&self, (x, y): (f64, f64)) -> bool {
        self.x.can_show(x) && self.y.can_show(y)
    }

    fn draw_curve(&self, area: &Area<'_>, index: usize, parts: &[Vec<Pixel>]) -> Drawn {
        let style = &STYLES[index % DISTINCT];
        for part in parts {
            stroke(area, style, part)?;
            let dots = match self.dots {
                Dots::All => part.as_slice(),
                // A line of one point is none.
                _ if part.len() == 1 => part,
                _ => &[],
            };
            for &dot in dots {
                area.draw(&Circle::new(dot, 3, style.colour.filled()))?;
            }
        }
        let Some(&(x, y)) = parts.last().and_then(|part| part.last()) else { return Ok(()) };
        if self.dots == Dots::Last {
            area.draw(&Circle::new((x, y), 3, style.colour.filled()))?;
        }
        if self.curves.len() > DISTINCT {
            // Many end at the same share: one above the other, so that neighbours stay readable.
            text(area, &(index + 1).to_string(), (x + 4, y - 8 - 12 * (index % 4) as i32), 13, HPos::Left)?;
        }
        Ok(())
    }
}

/// Where the axes enclose the picture, pixels.
struct Plot {
    left: i32,
    right: i32,
    top: i32,
    bottom: i32,
}

impl Plot {
    fn upright(&self, area: &Area<'_>, at: i32, index: i32, name: &str) -> Drawn {
        area.draw(&PathElement::new([(at, self.top), (at, self.bottom)], BLACK.stroke_width(2)))?;
        // One below the other, so that neighbours stay readable, and on the side where there is room.
        let y = self.top + 10 + 18 * (index % 12);
        let left_of_it = at - self.left > (self.right - self.left) * 3 / 5;
        if left_of_it {
            text(area, name, (at - 6, y), 15, HPos::Right)
        } else {
            text(area, name, (at + 6, y), 15, HPos::Left)
        }
    }

    fn across(&self, area: &Area<'_>, at: i32, name: &str) -> Drawn {
        area.draw(&PathElement::new([(self.left, at), (self.right, at)], BLACK.stroke_width(2)))?;
        let y = if at - self.top < 24 { at + 12 } else { at - 10 };
        text(area, name, (self.right - 6, y), 15, HPos::Right)
    }
}

/// What the lines are, beside the plot.
struct Legend {
    entries: Vec<(Symbol, Vec<String>)>,
    width: i32,
    height: i32,
}

enum Symbol {
    Line(usize),
    Moment,
    Fill(usize),
}

impl Legend {
    fn of(picture: &Picture) -> Self {
        let numbered = picture.curves.len() > DISTINCT;
        let names = picture.curves.iter().enumerate().map(|(index, curve)| {
            let number = if numbered { format!("{}: ", index + 1) } else { String::new() };
            (Symbol::Line(index), format!("{number}{}", curve.name))
        });
        let moments = picture.moments.iter().map(|(name, _)| (Symbol::Moment, name.clone()));
        Self::new(names.chain(moments))
    }

    /// The kinds of bars.
    fn of_fills(kinds: &[String]) -> Self {
        Self::new(kinds.iter().enumerate().map(|(n, kind)| (Symbol::Fill(n), format!("{}: {kind}", n + 1))))
    }

    fn new(names: impl Iterator<Item = (Symbol, String)>) -> Self {
        let entries: Vec<_> = names.map(|(symbol, name)| (symbol, wrapped(&clean(&name)))).collect();
        let letters = entries.iter().flat_map(|(_, lines)| lines.iter().map(|line| line.chars().count())).max();
        let lines: usize = entries.iter().map(|(_, lines)| lines.len()).sum();
        Self {
            width: letters.map_or(0, |letters| 18 + LEGEND_TEXT + (letters as f64 * LETTER) as i32),
            height: lines as i32 * LINE_HEIGHT + entries.len() as i32 * 8 + 16,
            entries,
        }
    }

    fn draw(&self, area: &Area<'_>, (x, mut y): Pixel) -> Drawn {
        for (symbol, lines) in &self.entries {
            match symbol {
                Symbol::Line(index) => stroke(area, &STYLES[index % DISTINCT], &[(x, y), (x + LEGEND_LINE, y)])?,
                Symbol::Moment => {
                    let middle = x + LEGEND_LINE / 2;
                    area.draw(&PathElement::new([(middle, y - 6), (middle, y + 6)], BLACK.stroke_width(2)))?;
                }
                Symbol::Fill(index) => box_of(area, (x + 6, y - 7), (x + LEGEND_LINE - 4, y + 7), *index)?,
            }
            for (number, line) in lines.iter().enumerate() {
                text(area, line, (x + LEGEND_TEXT, y + number as i32 * LINE_HEIGHT), 15, HPos::Left)?;
            }
            y += lines.len() as i32 * LINE_HEIGHT + 8;
        }
        Ok(())
    }
}

/// In at most two lines; what is too long for them ends with an ellipsis.
fn wrapped(name: &str) -> Vec<String> {
    let letters: Vec<char> = name.chars().collect();
    if letters.len() <= LEGEND_WRAP {
        return vec![name.to_owned()];
    }
    let space = letters[..=LEGEND_WRAP].iter().rposition(|&letter| letter == ' ').filter(|&at| at > 0);
    let (first, rest) = match space {
        Some(at) => (&letters[..at], &letters[at + 1..]),
        None => letters.split_at(LEGEND_WRAP),
    };
    let mut second: String = rest.iter().take(LEGEND_WRAP).collect();
    if rest.len() > LEGEND_WRAP {
        second.pop();
        second.push('…');
    }
    vec![first.iter().collect(), second]
}

/// One bar of a stacked picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// What it is.
    pub name: String,
    /// Its parts, left to right: which of the picture's kinds, and how long, ns.
    pub parts: Vec<(usize, f64)>,
}

/// Greys that tell neighbours apart; numbers in the bars and in the legend tell the rest.
const FILLS: [u8; 4] = [235, 150, 205, 120];

/// Bars that show how a whole is divided, one below the other, each with its whole in numbers at its end. `kinds` are
/// the names of the parts.
pub fn stacked(title: &str, description: &str, kinds: &[String], bars: &[Bar]) -> String {
    const ROW: i32 = 32;
    const BAR: i32 = 22;
    let whole = |bar: &Bar| bar.parts.iter().map(|part| part.1).filter(|ns| *ns > 0.0).sum::<f64>();
    let unit = Unit::of(bars.iter().map(whole));
    let legend = Legend::of_fills(kinds);
    let (names, left) = beside_bars(bars.iter().map(|bar| bar.name.as_str()));
    let (top, right) = ((MARGIN + CAPTION) as i32, left + 560);
    let bottom = top + ROW * bars.len() as i32;
    let beside = right + 110;
    let size = (beside + legend.width + MARGIN as i32, (bottom + 24).max(top + legend.height));
    let place = |share: f64| left + (share.clamp(0.0, 1.0) * f64::from(right - left)).round() as i32;
    drawn((size.0 as u32, size.1 as u32), title, description, |area| {
        text(area, title, (MARGIN as i32, MARGIN as i32 + 8), 20, HPos::Left)?;
        for (row, (bar, name)) in bars.iter().zip(&names).enumerate() {
            let y = top + ROW * row as i32;
            text(area, name, (left - 8, y + BAR / 2), 15, HPos::Right)?;
            let (whole, mut from) = (whole(bar), 0.0);
            for &(kind, ns) in bar.parts.iter().filter(|part| part.1 > 0.0) {
                let to = from + ns / whole;
                let (start, end) = (place(from), place(to));
                box_of(area, (start, y), (end, y + BAR), kind)?;
                let label = format!("{}: {:.0} %", kind + 1, (to - from) * 100.0);
                let label = if end - start > 60 { label } else { (kind + 1).to_string() };
                if end - start > 12 {
                    text(area, &label, (i32::midpoint(start, end), y + BAR / 2), 14, HPos::Center)?;
                }
                from = to;
            }
            text(area, &unit.show(whole), (right + 8, y + BAR / 2), 15, HPos::Left)?;
        }
        legend.draw(area, (beside, top + BAR / 2))?;
        area.present()
    })
}

/// Bars in groups, one below the other, each with its value at its end; `kinds` are what each group has one of. Over a log
/// axis if the values need one: the lengths then compare ratios.
pub fn grouped(title: &str, description: &str, kinds: &[String], groups: &[(String, Vec<(usize, f64)>)]) -> String {
    const BAR: i32 = 18;
    const GAP: i32 = 12;
    let values = || groups.iter().flat_map(|(_, bars)| bars.iter().map(|bar| bar.1)).filter(|value| *value > 0.0);
    let (least, most) = span(values());
    let log = needs_log(values());
    // A bar of the least value is to be seen, too.
    let (from, to) = if log { ((least / 2.0).ln(), most.ln()) } else { (0.0, most) };
    let share = |value: f64| (if log { value.ln() } else { value } - from) / (to - from).max(f64::MIN_POSITIVE);
    let scale = if log { "length: logarithm of the value" } else { "length: the value" };
    let legend = Legend::of_fills(kinds);
    let (names, left) = beside_bars(groups.iter().map(|(name, _)| name.as_str()));
    let (top, right) = ((MARGIN + CAPTION) as i32, left + 520);
    let rows: usize = groups.iter().map(|(_, bars)| bars.len()).sum();
    let bottom = top + BAR * rows as i32 + GAP * groups.len() as i32;
    let beside = right + 90;
    let size = (beside + legend.width + MARGIN as i32, (bottom + 36).max(top + legend.height));
    drawn((size.0 as u32, size.1 as u32), title, description, |area| {
        text(area, title, (MARGIN as i32, MARGIN as i32 + 8), 20, HPos::Left)?;
        let mut y = top;
        for ((_, bars), name) in groups.iter().zip(&names) {
            text(area, name, (left - 8, y + BAR * bars.len() as i32 / 2), 15, HPos::Right)?;
            for &(kind, value) in bars {
                let length = if value > 0.0 { share(value).clamp(0.0, 1.0) * f64::from(right - left) } else { 0.0 };
                let end = left + length.round() as i32;
                box_of(area, (left, y), (end, y + BAR - 2), kind)?;
                text(
                    area,
                    &format!("{}: {}", kind + 1, three_digits(value)),
                    (end + 6, y + BAR / 2 - 1),
                    13,
                    HPos::Left,
                )?;
                y += BAR;
            }
            y += GAP;
        }
        text(area, scale, (left, y + 8), 13, HPos::Left)?;
        legend.draw(area, (beside, top + BAR / 2))?;
        area.present()
    })
}

/// The names of rows of bars, one line each, and where the bars begin beside them.
fn beside_bars<'a>(names: impl Iterator<Item = &'a str>) -> (Vec<String>, i32) {
    let names: Vec<String> = names.map(|name| wrapped(&clean(name)).swap_remove(0)).collect();
    let letters = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    (names, MARGIN as i32 + 10 + (letters as f64 * LETTER) as i32)
}

fn three_digits(value: f64) -> String {
    let whole = value.abs().max(1.0).log10().floor() as usize;
    format!("{value:.*}", 2usize.saturating_sub(whole))
}

fn box_of(area: &Area<'_>, from: Pixel, to: Pixel, kind: usize) -> Drawn {
    let grey = FILLS[kind % FILLS.len()];
    area.draw(&Rectangle::new([from, to], RGBColor(grey, grey, grey).filled()))?;
    area.draw(&Rectangle::new([from, to], BLACK.stroke_width(1)))
}

/// A whole SVG, with its title and description for those who cannot see it.
fn drawn(size: (u32, u32), title: &str, description: &str, draw: impl FnOnce(&Area<'_>) -> Drawn) -> String {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let drawing = area.fill(&WHITE).and_then(|()| draw(&area));
        drawing.expect("a string takes everything");
    }
    let head = svg.find('>').expect("an SVG begins with a tag");
    let (title, description) = (escape(title), escape(description));
    svg.insert_str(head + 1, &format!("\n<title>{title}</title>\n<desc>{description}</desc>"));
    svg.insert_str(head, &format!(" role=\"img\" aria-label=\"{title}\""));
    svg
}

fn stroke(area: &Area<'_>, style: &Style, points: &[Pixel]) -> Drawn {
    let line = style.colour.stroke_width(style.width);
    match style.dash {
        None => area.draw(&PathElement::new(points.to_vec(), line)),
        Some((length, gap)) => area.draw(&DashedPathElement::new(points.iter().copied(), length, gap, line)),
    }
}

fn text(area: &Area<'_>, words: &str, at: Pixel, size: u32, side: HPos) -> Drawn {
    let style = ("sans-serif", size).into_text_style(area).pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new(clean(words), at, style))
}

/// At most four points in each column of pixels: the first, the lowest, the highest, the last. It looks the same.
fn thinned(points: impl Iterator<Item = Pixel>) -> Vec<Pixel> {
    let mut kept: Vec<Pixel> = Vec::new();
    let mut column: Vec<Pixel> = Vec::new();
    let mut flush = |column: &mut Vec<Pixel>| {
        let Some((&first, &last)) = column.first().zip(column.last()) else { return };
        let lowest = column.iter().copied().min_by_key(|point| point.1).unwrap_or(first);
        let highest = column.iter().copied().max_by_key(|point| point.1).unwrap_or(first);
        let middle = if first.1 <= last.1 { [lowest, highest] } else { [highest, lowest] };
        for point in [first, middle[0], middle[1], last] {
            if kept.last() != Some(&point) {
                kept.push(point);
            }
        }
        column.clear();
    };
    for point in points {
        if column.last().is_some_and(|last| last.0 != point.0) {
            flush(&mut column);
        }
        column.push(point);
    }
    flush(&mut column);
    kept
}

/// The unit in which times that belong together are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nanoseconds.
    Nano,
    /// Microseconds: what is usual for networks.
    Micro,
    /// Milliseconds.
    Milli,
    /// Seconds.
    Second,
}

impl Unit {
    /// Microseconds, unless all of these times, ns, are far from them.
    pub fn of(times: impl Iterator<Item = f64>) -> Self {
        let (low, high) = times
            .filter(|time| time.is_finite() && *time > 0.0)
            .fold((f64::INFINITY, 0.0), |(low, high), time| (f64::min(low, time), f64::max(high, time)));
        match (low, high) {
            (f64::INFINITY, _) => Self::Micro,
            (_, high) if high < 5e3 => Self::Nano,
            (low, _) if low >= 1e9 => Self::Second,
            (low, high) if low >= 1e6 || high >= 1e10 => Self::Milli,
            _ => Self::Micro,
        }
    }

    /// `us`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nano => "ns",
            Self::Micro => "us",
            Self::Milli => "ms",
            Self::Second => "s",
        }
    }

    /// So many of it are `ns` nanoseconds.
    pub fn scaled(self, ns: f64) -> f64 {
        match self {
            Self::Nano => ns,
            Self::Micro => ns / 1e3,
            Self::Milli => ns / 1e6,
            Self::Second => ns / 1e9,
        }
    }

    /// The number alone, as precise as the unit deserves.
    pub fn number(self, ns: f64) -> String {
        let digits = match self {
            Self::Nano => 0,
            Self::Micro => 1,
            Self::Milli | Self::Second => 3,
        };
        format!("{:.digits$}", self.scaled(ns))
    }

    /// The number alone, without digits that an interval's end does not need.
    pub fn brief(self, ns: f64) -> String {
        if self.scaled(ns) >= 1000.0 { format!("{:.0}", self.scaled(ns)) } else { self.number(ns) }
    }

    /// The number and its unit.
    pub fn show(self, ns: f64) -> String {
        format!("{} {}", self.number(ns), self.name())
    }
}

/// A number of an axis: as people write it, or with its power of ten if it is far from 1.
fn plain(value: f64) -> String {
    let size = value.abs();
    if size > 0.0 && !(0.9e-4..1e6).contains(&size) {
        return format!("{value:.1e}").replace(".0e", "e");
    }
    let digits = if size >= 10.0 || size == 0.0 { 1 } else { (2.0 - size.log10().floor()) as usize };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// Without the characters that XML and terminals do not take as text.
pub(crate) fn clean(text: &str) -> String {
    let is_text = |letter: char| !letter.is_control() && !matches!(letter, '\u{fffe}' | '\u{ffff}');
    text.chars().map(|letter| if is_text(letter) { letter } else { '\u{fffd}' }).collect()
}

/// As text and as an attribute of XML and HTML, whatever it says.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in clean(text).chars() {
        match letter {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// The least and the largest of positive values.
pub(crate) fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, 0.0), |(low, high), value| (f64::min(low, value), f64::max(high, value)))
}

/// Whether values span so much that only a log axis shows all of them.
pub(crate) fn needs_log(values: impl Iterator<Item = f64> + Clone) -> bool {
    let (low, high) = span(values.clone());
    values.clone().all(|value| value.is_finite() && value > 0.0) && high / low >= 50.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn curve(name: &str, points: &[(f64, f64)]) -> Curve {
        Curve { name: name.to_owned(), points: points.to_vec() }
    }

    #[test]
    fn draws_every_curve_its_bound_and_what_it_is() {
        let curves = vec![curve("first", &[(1e4, 1.0), (2e4, 0.01)]), curve("second", &[(1e6, 1.0), (2e6, 0.01)])];
        let bounds = [("bound".to_owned(), 5e5)];
        let svg = Picture::ccdf("a title", "one-way latency", "share", curves, &bounds).svg();
        for part in [
            "role=\"img\" aria-label=\"a title\"",
            "<title>a title</title>",
            "first",
            "second",
            "bound 500.0 us",
            "one-way latency, us",
            ">\nshare\n<",
        ] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        // Both curves, in their lines' styles, and the bound.
        assert!(svg.matches("<polyline").count() >= 3 && svg.contains("stroke-width=\"2\""));
        // Four decades of time and two of shares, each with a label.
        for label in ["10", "100", "1000", "1", "0.1", "0.01"] {
            assert!(svg.contains(&format!(">\n{label}\n<")), "{label}: {svg}");
        }
    }

    #[test]
    fn what_cannot_be_drawn_is_a_gap() {
        let points = [(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0), (3.0, 2.0)];
        let svg = Picture::new("", Axis::linear("x"), Axis::linear("y"), vec![curve("c", &points)]).svg();
        let dots = svg.matches("<circle").count();
        assert_eq!(dots, 1, "the point alone is a dot, the others are a line: {svg}");
        assert!(!svg.contains("no samples"));
        let empty = Picture::new("", Axis::log("x"), Axis::log("y"), vec![curve("c", &[(0.0, 1.0)])]).svg();
        assert!(empty.contains("no samples"));
    }

    #[test]
    fn more_curves_than_styles_have_numbers() {
        let many = |count: usize| {
            let curves = (0..count).map(|n| curve("c", &[(0.0, n as f64), (1.0, n as f64)])).collect();
            Picture::new("", Axis::linear("x"), Axis::linear("y"), curves).svg()
        };
        assert!(!many(DISTINCT).contains("1: c"));
        let numbered = many(DISTINCT + 1);
        assert!(numbered.contains("1: c") && numbered.contains(&format!("{}: c", DISTINCT + 1)), "{numbered}");
    }

    #[test]
    fn axes_begin_and_end_with_round_numbers() {
        let scale = Axis::log("").scale([9.3, 23_890.0].into_iter(), 13);
        assert_eq!((scale.from, scale.to), (5.0, 50_000.0));
        assert_eq!(scale.ticks, [10.0, 100.0, 1_000.0, 10_000.0]);
        let narrow = Axis::log("").scale([130.0, 390.0].into_iter(), 13);
        assert_eq!((narrow.from, narrow.to, narrow.ticks), (100.0, 500.0, vec![100.0, 200.0, 500.0]));
        let linear = Axis::linear("").scale([3.0, 97.0].into_iter(), 13);
        assert_eq!((linear.from, linear.to, linear.ticks.len()), (0.0, 100.0, 6));
        let one = Axis::linear("").scale([5.0].into_iter(), 13);
        assert!(one.from < 5.0 && one.to > 5.0);
    }

    #[test]
    fn numbers_of_axes_are_short() {
        let numbers = [0.0, 0.1, 1e-4, 1e-5, 2e-5, 250.0, 10_000.0, 2e6, -0.5, 1.25];
        assert_eq!(numbers.map(plain), ["0", "0.1", "0.0001", "1e-5", "2e-5", "250", "10000", "2e6", "-0.5", "1.25"]);
    }

    #[test]
    fn units_suit_all_times() {
        assert_eq!(Unit::of([11e3, 21e6].into_iter()), Unit::Micro);
        assert_eq!(Unit::of([80.0, 400.0].into_iter()), Unit::Nano);
        assert_eq!(Unit::of([2e6, 3e7].into_iter()), Unit::Milli);
        assert_eq!(Unit::of([2e9].into_iter()), Unit::Second);
        assert_eq!(Unit::of([0.0, f64::NAN].into_iter()), Unit::Micro);
        assert_eq!(
            (Unit::Micro.show(1234.0), Unit::Micro.brief(19_005_400.0)),
            ("1.2 us".to_owned(), "19005".to_owned())
        );
    }

    #[test]
    fn long_names_take_two_lines_and_no_more() {
        assert_eq!(wrapped("udp level 7"), ["udp level 7"]);
        assert_eq!(wrapped("the first file of results, contended, udp level 7").len(), 2);
        let cut = wrapped(&"x".repeat(100));
        assert_eq!((cut.len(), cut[1].chars().count(), cut[1].ends_with('…')), (2, LEGEND_WRAP, true));
    }

    #[test]
    fn bars_have_their_wholes_beside_them() {
        let bars = [Bar { name: "one".to_owned(), parts: vec![(0, 30e3), (1, 90e3)] }];
        let kinds = ["app-sched", "snd-rx"].map(str::to_owned);
        let svg = stacked("title", "description", &kinds, &bars);
        for part in ["1: 25 %", "2: 75 %", "120.0 us", "1: app-sched", "<desc>description</desc>"] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
    }

    #[test]
    fn thinning_keeps_the_extremes_of_each_column() {
        let column = |x: i32| [5, 9, 1, 4].map(|y| (x, y));
        assert_eq!(thinned(column(3).into_iter()), [(3, 5), (3, 9), (3, 1), (3, 4)]);
        let many = (0..10_000).map(|n| (n / 1000, n % 7));
        assert!(thinned(many).len() <= 40);
    }

    proptest! {
        #[test]
        fn any_points_can_be_drawn(
            points in prop::collection::vec((any::<f64>(), any::<f64>()), 0..40),
            marks in prop::collection::vec(any::<f64>(), 0..3),
            (x_log, y_log) in any::<(bool, bool)>(),
        ) {
            let axis = |log| if log { Axis::log("a") } else { Axis::linear("a") };
            let marks: Vec<Mark> = marks.into_iter().map(|at| Mark { name: "m".to_owned(), at }).collect();
            let picture = Picture {
                upright: marks.clone(),
                across: marks,
                dots: Dots::All,
                ..Picture::new("t", axis(x_log), axis(y_log), vec![curve("c", &points)])
            };
            let svg = picture.svg();
            prop_assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"), "{}", svg);
            let named = points.iter().map(|&(ns, share)| (ns, share)).collect::<Vec<_>>();
            let bounds = [("b".to_owned(), points.first().map_or(0.0, |point| point.0))];
            prop_assert!(Picture::ccdf("t", "s", "y", vec![curve("c", &named)], &bounds).svg().ends_with("</svg>\n"));
            let parts = points.iter().map(|point| (0, point.0)).collect();
            let bar = Bar { name: "b".to_owned(), parts };
            prop_assert!(stacked("t", "d", &["k".to_owned()], &[bar]).ends_with("</svg>\n"));
        }

        #[test]
        fn no_text_leaves_its_place(text in "\\PC{0,10}[<>&\"'\u{0}-\u{1f}]{0,6}") {
            let escaped = escape(&text);
            prop_assert!(!escaped.contains(['<', '>', '"', '\'']) && !escaped.chars().any(char::is_control));
        }
    }
}
