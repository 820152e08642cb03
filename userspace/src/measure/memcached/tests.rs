//! The client against servers that are not what they should be. The real one is in `tests/tests/load.rs`.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use super::*;

/// What a server does with its `n`-th request of a connection, from 0, once the keys have their values.
type Behaviour = fn(n: usize, stream: &mut TcpStream, answer: &[u8]) -> bool;

/// A cache that answers as `behave` says, and is honest while keys get their values. It goes on for as long as the
/// process does.
fn server(behave: Behaviour) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (values, connections) = (Arc::new(Mutex::new(HashMap::new())), Arc::new(AtomicUsize::new(0)));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (values, honest) = (Arc::clone(&values), connections.fetch_add(1, Relaxed) == 0);
            std::thread::spawn(move || {
                let _ = serve(stream.unwrap(), &values, if honest { honestly } else { behave });
            });
        }
    });
    address
}

fn honestly(_: usize, stream: &mut TcpStream, answer: &[u8]) -> bool {
    stream.write_all(answer).is_ok()
}

fn serve(mut stream: TcpStream, values: &Mutex<HashMap<String, Vec<u8>>>, behave: Behaviour) -> std::io::Result<()> {
    let mut requests = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    for n in 0.. {
        line.clear();
        if requests.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words[..] {
            ["version"] => b"VERSION 0-fake\r\n".to_vec(),
            ["get", key] => match values.lock().unwrap().get(key) {
                Some(value) => {
                    [format!("VALUE {key} 0 {}\r\n", value.len()).as_bytes(), value, b"\r\nEND\r\n"].concat()
                }
                None => b"END\r\n".to_vec(),
            },
            ["set", key, _, _, length] => {
                let mut value = vec![0; length.parse::<usize>().unwrap() + 2];
                requests.read_exact(&mut value)?;
                value.truncate(value.len() - 2);
                values.lock().unwrap().insert(key.to_owned(), value);
                b"STORED\r\n".to_vec()
            }
            _ => panic!("{line}"),
        };
        if !behave(n, &mut stream, &answer) {
            return Ok(());
        }
    }
    Ok(())
}

/// Half a second of 2000 requests a second.
fn client(to: SocketAddr) -> Client {
    Client {
        connections: 4,
        rate: 2_000.0,
        duration: Duration::from_millis(600),
        warm_up: Duration::from_millis(100),
        timeout: Duration::from_millis(400),
        workload: Workload { keys: 200, ..Client::new(to).workload },
        ..Client::new(to)
    }
}

fn figure(run: &Run, name: &str) -> f64 {
    run.figures.iter().find(|figure| figure.name == name).unwrap_or_else(|| panic!("no figure {name}")).value
}

/// Every request is accounted for, whatever the server does.
fn measured(behave: Behaviour) -> (Outcome, Run) {
    let outcome = client(server(behave)).run(&Progress::default(), &mut |_| {}).unwrap();
    let run = outcome.run("test");
    let counts = run.streams[0].counts.unwrap();
    let errors = figure(&run, "server errors") as u64;
    assert_eq!(counts.sent, counts.received + counts.corrupted + counts.lost + errors, "{counts:?}");
    assert_eq!(run.streams[0].response.samples, counts.received);
    assert_eq!(run.streams[0].series.iter().map(|second| second.samples).sum::<u64>(), counts.received);
    (outcome, run)
}

#[test]
fn an_honest_server_answers_all() {
    for (threads, poisson) in [(1, true), (2, false)] {
        let client = Client { threads, poisson, ..client(server(honestly)) };
        let outcome = client.run(&Progress::default(), &mut |_| {}).unwrap();
        assert_eq!((outcome.server.as_str(), outcome.notes()), ("0-fake", vec![]));
        let run = outcome.run("alone");
        let stream = &run.streams[0];
        let counts = stream.counts.unwrap();
        assert_eq!(counts.sent, counts.received);
        if poisson {
            assert!((700..=1_300).contains(&counts.sent), "{counts:?}");
        } else {
            assert_eq!(counts.sent, 1_000);
        }
        assert_eq!(figure(&run, "gets") + figure(&run, "sets"), counts.received as f64);
        assert_eq!((figure(&run, "misses"), figure(&run, "server errors")), (0.0, 0.0));
        assert_eq!((stream.sample, stream.worst.len()), (Sample::Request, 10));
        // From the intended send it cannot be shorter than from the actual one.
        let (response, service) = (&stream.response, stream.service.as_ref().unwrap());
        assert!(response.mean_ns >= service.mean_ns && response.min_ns >= service.min_ns);
    }
}

#[test]
fn a_slow_server_shows_in_the_response_and_does_not_move_the_schedule() {
    // One answer each 10 ms a connection: 400 a second of 2000.
    let (outcome, run) = measured(|_, stream, answer| {
        std::thread::sleep(Duration::from_millis(10));
        honestly(0, stream, answer)
    });
    let stream = &run.streams[0];
    let counts = stream.counts.unwrap();
    let (response, service) = (&stream.response, stream.service.as_ref().unwrap());
    // 16 answers are owed by each connection, and so the schedule waits; the response knows of it.
    assert!(response.max_ns > service.max_ns, "{response:?} {service:?}");
    assert!(response.max_ns.unwrap() > 200_000_000);
    let unsent = figure(&run, "requests never sent") as u64;
    assert!((700..=1_300).contains(&(counts.sent + unsent)), "{counts:?} {unsent}");
    // The client itself was not late, and nobody says so.
    assert!(!stream.generator.as_ref().unwrap().limited, "{:?}", stream.lateness);
    assert_eq!(unsent > 0, outcome.notes().iter().any(|note| note.contains("never sent")));
}

#[test]
fn wrong_bytes_are_corrupted_and_no_samples() {
    let (outcome, run) = measured(|n, stream, answer| {
        let mut answer = answer.to_vec();
        if n % 2 == 1 && answer.starts_with(b"VALUE") && answer.len() > 60 {
            let last = answer.len() - 8;
            answer[last] ^= 1;
        }
        honestly(0, stream, &answer)
    });
    let corrupted = run.streams[0].counts.unwrap().corrupted;
    assert!(corrupted > 50, "{corrupted}");
    assert!(outcome.notes().iter().any(|note| note.contains("other bytes")), "{:?}", outcome.notes());
}

#[test]
fn a_server_that_hangs_up_is_called_again() {
    let (outcome, run) = measured(|n, stream, answer| n < 50 && honestly(n, stream, answer));
    assert!(figure(&run, "connections lost") >= 2.0);
    assert!(figure(&run, "connections made again") >= 1.0);
    assert!(run.streams[0].counts.unwrap().lost >= 1);
    let note = &outcome.notes()[0];
    // Depending on who notices first.
    assert!(["hung up", "reset", "Broken pipe"].iter().any(|part| note.contains(part)), "{note}");
}

#[test]
fn a_server_that_falls_silent_is_given_up() {
    let (outcome, run) = measured(|n, stream, answer| n >= 20 || honestly(n, stream, answer));
    assert!(run.streams[0].counts.unwrap().lost >= 4);
    assert!(outcome.notes()[0].contains("no answer within 400ms"), "{:?}", outcome.notes());
}

#[test]
fn garbage_and_answers_of_others_break_the_connection() {
    let (outcome, _) = measured(|n, stream, answer| honestly(n, stream, if n < 20 { answer } else { b"\x00\xff\r\n" }));
    assert!(outcome.notes()[0].contains("no answer to the request"), "{:?}", outcome.notes());
    let (outcome, _) = measured(|n, stream, answer| {
        honestly(n, stream, answer) && (n != 10 || honestly(n, stream, b"END\r\nEND\r\nEND\r\n"))
    });
    assert!(outcome.tally.broken >= 1, "{:?}", outcome.notes());
}

#[test]
fn errors_of_the_server_are_counted() {
    let (outcome, run) = measured(|n, stream, answer| {
        honestly(n, stream, if n % 10 == 0 { b"SERVER_ERROR out of memory storing object\r\n" } else { answer })
    });
    assert!(figure(&run, "server errors") >= 10.0 && figure(&run, "connections lost") == 0.0);
    assert!(outcome.notes()[0].contains("SERVER_ERROR"), "{:?}", outcome.notes());
}

#[test]
fn a_measurement_that_is_stopped_keeps_what_was_measured() {
    let progress = Progress::default();
    let client = Client { duration: Duration::from_secs(60), ..client(server(honestly)) };
    let outcome = std::thread::scope(|scope| {
        let running = scope.spawn(|| client.run(&progress, &mut |_| {}).unwrap());
        while progress.answered() < 500 {
            std::thread::sleep(Duration::from_millis(5));
        }
        progress.stop();
        running.join().unwrap()
    });
    assert!(outcome.stopped && outcome.has_samples() && outcome.notes()[0].contains("stopped after"));
    let counts = outcome.run("stopped").streams[0].counts.unwrap();
    assert!(counts.sent == counts.received && outcome.duration_ns < 30_000_000_000, "{counts:?}");
}

#[test]
fn what_cannot_begin_says_why() {
    let error = |client: Client| format!("{:#}", client.run(&Progress::default(), &mut |_| {}).unwrap_err());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| listener.accept().unwrap().0.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap());
        let error = error(client(to));
        assert!(error.contains("no memcached") && error.contains("HTTP/1.1 400"), "{error}");
    });
    drop(listener);
    assert!(error(client(to)).contains("refused"));
    for (wrong, part) in [
        (Client { rate: 0.0, ..client(to) }, "above 0"),
        (Client { threads: 5, ..client(to) }, "connection of its own"),
        (Client { warm_up: Duration::ZERO, ..client(to) }, "100ms"),
        (Client { warm_up: Duration::from_secs(1), ..client(to) }, "nothing to measure"),
        (Client { workload: Workload { keys: 0, ..client(to).workload }, ..client(to) }, "0 keys"),
    ] {
        assert!(wrong.check().unwrap_err().contains(part), "{part}");
    }
}
