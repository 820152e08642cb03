//! As much of PNG as a screenshot needs (W3C, "Portable Network Graphics"): eight bits a channel, not interlaced.

use std::io::Read;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::ZlibDecoder;

/// The share of an image's pixels that are not white.
pub fn share_not_white(png: &[u8]) -> Result<f64> {
    ensure!(png.starts_with(b"\x89PNG\r\n\x1a\n"), "no PNG");
    let (mut header, mut packed) = (None, Vec::new());
    let mut rest = &png[8..];
    while let Some((length, chunk)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        let (kind, data) = chunk.split_at_checked(4).context("a chunk without a kind")?;
        let data = data.get(..length).context("a chunk that is cut off")?;
        match kind {
            b"IHDR" => header = Some(data),
            b"IDAT" => packed.extend_from_slice(data),
            _ => {}
        }
        rest = &chunk[4 + length + 4..];
    }
    let header = header.filter(|header| header.len() == 13).context("no header")?;
    let width = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let channels = match header[8..] {
        [8, 2, 0, 0, 0] => 3,
        [8, 6, 0, 0, 0] => 4,
        _ => bail!("a form of PNG that is not read here: {:?}", &header[8..]),
    };
    let mut raw = Vec::new();
    ZlibDecoder::new(packed.as_slice()).read_to_end(&mut raw)?;
    let (mut coloured, mut pixels) = (0u64, 0u64);
    let mut above = vec![0; width * channels];
    for line in raw.chunks_exact(1 + width * channels) {
        let line = unfiltered(line[0], &line[1..], &above, channels)?;
        coloured += line.chunks_exact(channels).filter(|pixel| pixel[..3] != [255; 3]).count() as u64;
        pixels += width as u64;
        above = line;
    }
    ensure!(pixels > 0, "no pixels");
    Ok(coloured as f64 / pixels as f64)
}

/// A line as it was before its filter.
fn unfiltered(filter: u8, line: &[u8], above: &[u8], channels: usize) -> Result<Vec<u8>> {
    let mut plain = line.to_vec();
    for at in 0..plain.len() {
        let left = if at >= channels { plain[at - channels] } else { 0 };
        let corner = if at >= channels { above[at - channels] } else { 0 };
        let guess = match filter {
            0 => 0,
            1 => left,
            2 => above[at],
            3 => u16::midpoint(left.into(), above[at].into()) as u8,
            4 => paeth(left, above[at], corner),
            other => bail!("no filter {other}"),
        };
        plain[at] = plain[at].wrapping_add(guess);
    }
    Ok(plain)
}

fn paeth(left: u8, above: u8, corner: u8) -> u8 {
    let guess = i16::from(left) + i16::from(above) - i16::from(corner);
    let far = |from: u8| (guess - i16::from(from)).abs();
    if far(left) <= far(above) && far(left) <= far(corner) {
        left
    } else if far(above) <= far(corner) {
        above
    } else {
        corner
    }
}
