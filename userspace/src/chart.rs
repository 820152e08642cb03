//! Pictures of latency, readable in black and white.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// One line of a picture.
pub struct Curve {
    /// What it is.
    pub name: String,
    /// Of a distribution (ns, share of samples above), in ascending order of time; else what the axes say.
    pub points: Vec<(f64, f64)>,
}

/// What the axes show.
pub struct Axes<'a> {
    /// Across.
    pub x: &'a str,
    /// Upwards.
    pub y: &'a str,
}

struct Style {
    colour: RGBColor,
    width: u32,
    /// Length and gap of the dashes, pixels; `None` for a solid line.
    dash: Option<(u32, u32)>,
}

/// Told apart by width and dashes, not by colour alone.
const STYLES: [Style; 7] = [
    Style { colour: RGBColor(110, 110, 110), width: 1, dash: None },
    Style { colour: RGBColor(200, 60, 20), width: 2, dash: Some((10, 5)) },
    Style { colour: RGBColor(0, 90, 180), width: 3, dash: None },
    Style { colour: RGBColor(150, 100, 0), width: 2, dash: Some((3, 4)) },
    Style { colour: RGBColor(0, 130, 90), width: 3, dash: Some((14, 4)) },
    Style { colour: RGBColor(120, 0, 120), width: 1, dash: Some((8, 3)) },
    Style { colour: RGBColor(0, 0, 0), width: 1, dash: Some((2, 2)) },
];

const WIDTH: u32 = 960;
const HEIGHT: u32 = 560;
const LEGEND_X: i32 = WIDTH as i32 - 172;
const LEGEND_LINE: i32 = 34;

type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Draws complementary distributions on two log axes, with bounds (name, ns) as lines.
///
/// # Errors
/// If the file cannot be written.
pub fn ccdf(path: &Path, title: &str, axes: &Axes<'_>, curves: &[Curve], bounds: &[(String, f64)]) -> Result<()> {
    draw_ccdf(path, title, axes, curves, bounds).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

/// Draws lines over linear axes, with a bound (name, y) across.
///
/// # Errors
/// If the file cannot be written.
pub fn lines(path: &Path, title: &str, axes: &Axes<'_>, curves: &[Curve], bound: (&str, f64)) -> Result<()> {
    draw_lines(path, title, axes, curves, bound).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn draw_ccdf(path: &Path, title: &str, axes: &Axes<'_>, curves: &[Curve], bounds: &[(String, f64)]) -> Drawn {
    let bounds_us = || bounds.iter().map(|bound| bound.1 / 1e3);
    let times = || curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.0 / 1e3)).chain(bounds_us());
    let left = times().fold(f64::INFINITY, f64::min).clamp(0.1, 1e9);
    let right = times().fold(left * 1.01, f64::max);
    // Whole decades, so that the labels are round numbers.
    let (left, right) = (10f64.powf(left.log10().floor()), 10f64.powf(right.log10().ceil()));
    let lowest = curves.iter().flat_map(|curve| curve.points.iter().map(|p| p.1)).fold(0.1, f64::min);
    let bottom = 10f64.powf(lowest.log10().floor());

    let area = SVGBackend::new(path, (WIDTH, HEIGHT)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 22))
        .margin(16)
        .margin_right(190)
        .x_label_area_size(48)
        .y_label_area_size(84)
        .build_cartesian_2d((left..right).log_scale(), (bottom..1.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc(axes.x)
        .y_desc(axes.y)
        .x_label_formatter(&|value| plain(*value))
        .y_label_formatter(&|value| format!("{value:e}").replace("1e0", "1"))
        .light_line_style(WHITE)
        .axis_desc_style(("sans-serif", 16))
        .label_style(("sans-serif", 14))
        .draw()?;

    let (_, plot_y) = chart.plotting_area().get_pixel_range();
    for (index, curve) in curves.iter().enumerate() {
        let points: Vec<(f64, f64)> = curve.points.iter().map(|&(ns, share)| (ns / 1e3, share)).collect();
        if let Some(&last) = points.last() {
            chart.draw_series([Circle::new(last, 3, STYLES[index % STYLES.len()].colour.filled())])?;
        }
        line(&mut chart, index, points)?;
        legend(&area, plot_y.start, index, &curve.name)?;
    }
    for (index, (name, ns)) in bounds.iter().enumerate() {
        let bound_us = ns / 1e3;
        chart.draw_series(LineSeries::new([(bound_us, bottom), (bound_us, 1.0)], BLACK.stroke_width(2)))?;
        let (x, y) = chart.backend_coord(&(bound_us, 1.0));
        // One below the other, so that neighbours stay readable.
        let y = y + 4 + 18 * index as i32;
        area.draw(&Text::new(format!("{name} {} us", plain(bound_us)), (x + 5, y), ("sans-serif", 15)))?;
    }
    area.present()?;
    Ok(())
}

fn draw_lines(path: &Path, title: &str, axes: &Axes<'_>, curves: &[Curve], bound: (&str, f64)) -> Drawn {
    let xs = || curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.0));
    let ys = || curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.1));
    let (left, right) = (xs().fold(f64::INFINITY, f64::min), xs().fold(f64::NEG_INFINITY, f64::max));
    // What grows without end leaves the picture rather than flattening the rest.
    let top = ys().fold(bound.1, f64::max).min(4.0 * bound.1) * 1.05;
    let area = SVGBackend::new(path, (WIDTH, HEIGHT)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 22))
        .margin(16)
        .margin_right(190)
        .x_label_area_size(48)
        .y_label_area_size(84)
        .build_cartesian_2d(left..right.max(left + 1e-9), 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc(axes.x)
        .y_desc(axes.y)
        .light_line_style(WHITE)
        .axis_desc_style(("sans-serif", 16))
        .label_style(("sans-serif", 14))
        .draw()?;
    let (_, plot_y) = chart.plotting_area().get_pixel_range();
    // The last ones first: where they lie on each other, dashes show what is below.
    for (index, curve) in curves.iter().enumerate().rev() {
        line(&mut chart, index, curve.points.iter().copied().take_while(|point| point.1 <= top).collect())?;
        legend(&area, plot_y.start, index, &curve.name)?;
    }
    chart.draw_series(LineSeries::new([(left, bound.1), (right, bound.1)], BLACK.stroke_width(2)))?;
    let (x, y) = chart.backend_coord(&(right, bound.1));
    area.draw(&Text::new(bound.0.to_owned(), (x - 170, y - 20), ("sans-serif", 15)))?;
    area.present()?;
    Ok(())
}

/// The line of a curve, in the style of its place.
fn line<'a, C>(chart: &mut ChartContext<'a, SVGBackend<'a>, C>, index: usize, points: Vec<(f64, f64)>) -> Drawn
where
    C: plotters::coord::CoordTranslate<From = (f64, f64)>,
{
    let style = &STYLES[index % STYLES.len()];
    let stroke = style.colour.stroke_width(style.width);
    match style.dash {
        None => chart.draw_series(LineSeries::new(points, stroke))?,
        Some((length, gap)) => chart.draw_series(DashedLineSeries::new(points, length, gap, stroke))?,
    };
    Ok(())
}

/// One entry of the legend, outside the plot, in the order of the table.
fn legend(area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>, top: i32, index: usize, name: &str) -> Drawn {
    let style = &STYLES[index % STYLES.len()];
    let y = top + 16 + 24 * index as i32;
    for (from, to) in dashes(style.dash) {
        let dash = vec![(LEGEND_X + from, y), (LEGEND_X + to, y)];
        area.draw(&PathElement::new(dash, style.colour.stroke_width(style.width)))?;
    }
    area.draw(&Text::new(name.to_owned(), (LEGEND_X + 42, y - 8), ("sans-serif", 15)))?;
    Ok(())
}

/// Where the dashes of a line in the legend begin and end, pixels.
fn dashes(dash: Option<(u32, u32)>) -> Vec<(i32, i32)> {
    let (length, gap) = dash.map_or((LEGEND_LINE, 0), |(length, gap)| (length as i32, gap as i32));
    (0..LEGEND_LINE).step_by((length + gap) as usize).map(|from| (from, (from + length).min(LEGEND_LINE))).collect()
}

fn plain(value: f64) -> String {
    if value >= 10.0 { format!("{value:.0}") } else { format!("{value}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legend_has_the_dashes_of_the_curve() {
        assert_eq!(dashes(None), [(0, 34)]);
        assert_eq!(dashes(Some((10, 5))), [(0, 10), (15, 25), (30, 34)]);
    }

    #[test]
    fn draws_every_curve_and_the_bound() {
        let file = std::env::temp_dir().join(format!("qjump-chart-{}.svg", std::process::id()));
        let curve = |name: &str, at: f64| Curve { name: name.to_owned(), points: vec![(at, 1.0), (at * 2.0, 0.01)] };
        let axes = Axes { x: "one-way latency, us", y: "share" };
        let curves = [curve("first", 1e4), curve("second", 1e6)];
        ccdf(&file, "a title", &axes, &curves, &[("bound".to_owned(), 5e5)]).unwrap();
        let distribution = std::fs::read_to_string(&file).unwrap();
        lines(&file, "a title", &axes, &curves, ("bound 500 us", 1.5)).unwrap();
        let plain = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        for part in ["a title", "first", "second", "bound 500 us", "one-way latency, us", "share"] {
            assert!(distribution.contains(part) && plain.contains(part), "{part}");
        }
    }
}
