//! Text.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use ganglion_proto::job::Exclusion;
use ganglion_proto::stream::{SampleStream, StreamShape, ledger_term};

use super::*;

fn of(path: &Path, context: u32) -> Data {
    Data { context: Some(context), ..Data::plain(DataKind::Text, Some(path.to_owned()), 0) }
}

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    folder
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn tokens(data: &DataSet, index: usize) -> Vec<i64> {
    match data.read_all(&[index]).unwrap() {
        Values::Tokens(tokens) => tokens,
        other => panic!("no tokens: {other:?}"),
    }
}

fn all(data: &DataSet) -> Vec<Vec<i64>> {
    (0..data.len()).map(|index| tokens(data, index)).collect()
}

fn bytes(text: &str) -> Vec<i64> {
    text.bytes().map(i64::from).collect()
}

/// The files of tokens beside a source.
fn caches(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.to_string_lossy().contains(".tokens-"));
    found.sort();
    found
}

/// Words and their numbers, as Hugging Face's tokenizers save them.
fn tokenizer(words: &[&str], extra: &str) -> String {
    let vocabulary: Vec<String> =
        words.iter().zip(0..).map(|(word, number)| format!("\"{word}\": {number}")).collect();
    format!(
        r#"{{"version": "1.0", "truncation": {{"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}},
            "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": {{"type": "Whitespace"}},
            "post_processor": null, "decoder": null{extra},
            "model": {{"type": "WordLevel", "vocab": {{{}}}, "unk_token": "?"}}}}"#,
        vocabulary.join(", ")
    )
}

#[test]
fn a_sample_is_a_fixed_place_of_the_text() {
    let folder = folder(&[("a.txt", b"0123456789abc")]);
    let data = DataSet::open(&of(&folder.path().join("a.txt"), 4)).unwrap();
    assert_eq!(data.shape(), &SampleShape::Tokens(TokenShape { context: 4, vocabulary: 256 }));
    // Each token but the first is predicted once.
    assert_eq!(all(&data), ["01234", "45678", "89abc"].map(bytes));
    assert_eq!(
        data.found().to_string(),
        "3 samples of 4 tokens, out of 13 of 256 different ones; 13 bytes of text in 1 document"
    );
    assert!(caches(folder.path()).is_empty(), "bytes are read where they lie");
}

#[test]
fn documents_are_in_the_order_of_their_names_with_a_separator_between() {
    let files: &[(&str, &[u8])] = &[
        ("b.md", b"cd"),
        ("a/z.TXT", b"ab"),
        ("c.jsonl", b""),
        ("d.txt", b"e"),
        ("x.bin", b"no"),
        (".h.txt", b"no"),
    ];
    let folder = folder(files);
    let data = DataSet::open(&of(folder.path(), 1)).unwrap();
    let text: Vec<i64> = all(&data).iter().map(|pair| pair[0]).collect();
    assert_eq!(text, bytes("ab\0cd\0\0"), "the last token is only predicted");
    assert_eq!(tokens(&data, 6), bytes("\0e"));
    let line = data.found().to_string();
    assert_says(&line, &["5 bytes of text in 4 documents", "1 .bin (x.bin)", "1 hidden (.h.txt)"]);
}

#[test]
fn compressed_text_is_the_same_text() {
    let files: &[(&str, &[u8])] = &[("a.txt", b"one two"), ("b.txt", b"three four")];
    let plain = folder(files);
    let files: Vec<(String, Vec<u8>)> =
        files.iter().map(|(name, bytes)| (format!("{name}.gz"), packed(bytes))).collect();
    let other =
        folder(&files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect::<Vec<_>>());
    let [plain, other] = [&plain, &other].map(|folder| DataSet::open(&of(folder.path(), 3)).unwrap());
    assert_eq!(all(&plain), all(&other));
    assert_eq!(plain.fingerprint(), other.fingerprint());
    let of_text = |data: &DataSet| (data.text().unwrap().tokens(), data.text().unwrap().bytes());
    assert_eq!((of_text(&plain), of_text(&other)), ((18, 17), (18, 17)));
}

#[test]
fn tokens_are_kept_whole_and_looked_at_before_they_are_used() {
    let folder = folder(&[("a.txt.gz", &packed(b"some text that is turned into tokens"))]);
    let path = folder.path().join("a.txt.gz");
    let open = || DataSet::open(&of(&path, 5)).unwrap();
    let (first, expected) = (open().fingerprint(), all(&open()));
    let [cache] = caches(folder.path()).try_into().unwrap();
    let inode = || fs::metadata(&cache).unwrap().ino();
    let (before, whole) = (inode(), fs::read(&cache).unwrap());
    assert_eq!(all(&open()), expected);
    assert_eq!(inode(), before, "it is used again");
    for damage in [
        Box::new(|bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1) as Box<dyn Fn(&mut Vec<u8>)>,
        Box::new(|bytes| bytes.truncate(bytes.len() - 1)),
        Box::new(|bytes| bytes.truncate(100)),
        Box::new(|bytes| bytes.clear()),
        Box::new(|bytes| bytes[3] ^= 1),
    ] {
        let mut bytes = whole.clone();
        damage(&mut bytes);
        fs::write(&cache, bytes).unwrap();
        assert_eq!(all(&open()), expected);
        assert!(fs::read(&cache).unwrap() == whole, "it is made again");
    }
    // Another text has a file of its own.
    fs::write(&path, packed(b"another text, and its tokens")).unwrap();
    assert_ne!(open().fingerprint(), first);
    assert_eq!(caches(folder.path()).len(), 2);
}

#[test]
fn several_workers_make_the_tokens_once() {
    let folder = folder(&[("a.txt.gz", &packed(&b"some text ".repeat(10_000)))]);
    let path = folder.path().join("a.txt.gz");
    let open = || DataSet::open(&of(&path, 5)).unwrap().fingerprint();
    let found: Vec<[u8; 32]> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert!(found.iter().all(|one| *one == found[0]));
    let mut names: Vec<String> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() == 2 && names[1].starts_with("a.txt.gz.tokens-"), "{names:?}");
}

#[cfg(feature = "tokenizers")]
#[test]
fn a_tokenizer_gives_tokens_of_whole_texts() {
    let words = tokenizer(&["?", "the", "dog", "saw", "cat"], "");
    let folder = folder(&[
        ("t/tokenizer.json", words.as_bytes()),
        ("d/a.txt", b"the dog saw\nthe cat"),
        ("d/b.txt", b"cat saw"),
    ]);
    let file = folder.path().join("t/tokenizer.json");
    let job = Data { tokenizer: Some(file.clone()), ..of(&folder.path().join("d"), 1) };
    let data = DataSet::open(&job).unwrap();
    // Without one of the usual separators documents are set apart by an empty line, which has no token here;
    // and a limit of the file's does not cut.
    let all: Vec<i64> = (0..data.len()).flat_map(|index| tokens(&data, index)[..1].to_vec()).collect();
    assert_eq!(all, [1, 2, 3, 1, 4, 4]);
    let text = data.text().unwrap();
    assert_eq!((text.tokens(), text.bytes(), text.codec().vocabulary()), (7, 26, 5));
    assert_eq!(text.codec().decode(&[1, 4]).unwrap(), b"the cat");
    // Its number is the hash of the file.
    let hash = blake3::hash(words.as_bytes()).to_hex().to_string();
    DataSet::open(&Data { tokenizer_hash: Some(hash), ..job.clone() }).unwrap();
    let refused = refusal(DataSet::open(&Data { tokenizer_hash: Some("0".repeat(64)), ..job.clone() }));
    assert_says(
        &refused,
        &["data.tokenizer", "is another tokenizer than the run's", "000000000000", "put the same file"],
    );
    // Another tokenizer of the same words is another data set.
    let (before, count) = (data.fingerprint(), caches(folder.path()).len());
    fs::write(&file, tokenizer(&["?", "dog", "the", "saw", "cat"], "")).unwrap();
    assert_ne!(DataSet::open(&job).unwrap().fingerprint(), before);
    assert_eq!((count, caches(folder.path()).len()), (1, 2));
}

#[cfg(feature = "tokenizers")]
#[test]
fn a_separator_of_the_tokenizer_stands_between_documents() {
    let codec = TextCodec::read(tokenizer(&["?", "a", "<eos>"], "").as_bytes()).unwrap();
    assert_eq!(codec.separator(), [2]);
}

#[cfg(feature = "tokenizers")]
#[test]
fn a_long_text_is_cut_at_lines_and_stays_the_same_text() {
    let line = "the dog saw the cat\n";
    let text = line.repeat((1 << 20) / line.len());
    let words = tokenizer(&["?", "the", "dog", "saw", "cat"], "");
    let folder = folder(&[("tokenizer.json", words.as_bytes()), ("a.txt", text.as_bytes())]);
    let tokenizer = Some(folder.path().join("tokenizer.json"));
    let data = DataSet::open(&Data { tokenizer, ..of(&folder.path().join("a.txt"), 5) }).unwrap();
    assert_eq!(data.text().unwrap().tokens(), 5 * (text.len() / line.len()) as u64);
    for index in 0..data.len() {
        assert_eq!(tokens(&data, index), [1, 2, 3, 1, 4, 1], "{index}");
    }
}

#[cfg(feature = "tokenizers")]
#[test]
fn what_is_no_text_for_a_tokenizer_is_named_and_is_text_as_bytes() {
    let words = tokenizer(&["?", "a"], "");
    let folder = folder(&[("t.json", words.as_bytes()), ("d/a.txt", b"a a a"), ("d/b.txt", b"a a \xff a")]);
    let job = of(&folder.path().join("d"), 2);
    let refused =
        refusal(DataSet::open(&Data { tokenizer: Some(folder.path().join("t.json")), ..job.clone() }));
    assert_says(
        &refused,
        &["d/b.txt", "byte 4 is not UTF-8", "save the file as UTF-8, or remove data.tokenizer"],
    );
    assert!(caches(folder.path()).is_empty(), "nothing is half written");
    assert_eq!(DataSet::open(&job).unwrap().len(), 6);
}

#[cfg(feature = "tokenizers")]
#[test]
fn what_is_no_tokenizer_is_refused() {
    let broken = tokenizer(&["?"], "").replace("WordLevel", "Unheard");
    for (content, part) in [
        ("", "is no JSON"),
        ("{\"a\": ", "is no JSON"),
        ("[1, 2]", "is JSON, but no tokenizer"),
        ("{\"vocab\": {\"a\": 1}}", "is JSON, but no tokenizer"),
        (broken.as_str(), "is JSON, but no tokenizer"),
        (&tokenizer(&[], ""), "tokenizer"),
    ] {
        let folder = folder(&[("t.json", content.as_bytes()), ("a.txt", b"text")]);
        let job = of(&folder.path().join("a.txt"), 1);
        let refused = refusal(DataSet::open(&Data { tokenizer: Some(folder.path().join("t.json")), ..job }));
        assert_says(&refused, &["data.tokenizer", "t.json", part, "name a tokenizer.json"]);
    }
    let bpe = r#"{"type": "BPE", "dropout": 0.1, "vocab": {"a": 0}, "merges": []}"#;
    let start = tokenizer(&["?"], "");
    let random = format!("{}\"model\": {bpe}}}", start.split("\"model\"").next().unwrap());
    assert_says(
        &TextCodec::read(random.as_bytes()).unwrap_err(),
        &["drops merges at random", "dropout to null"],
    );
    TextCodec::read(random.replace("0.1", "null").as_bytes()).unwrap();
    let refused = TextCodec::open(Path::new("/nowhere/tokenizer.json")).unwrap_err();
    assert_says(&refused, &["cannot be read"]);
}

#[test]
fn too_little_text_is_refused() {
    let folder =
        folder(&[("a.txt", b"0123"), ("empty.txt", b""), ("d/x.png", b"no"), ("e/a.txt.gz", b"no gzip")]);
    let open = |name: &str| refusal(DataSet::open(&of(&folder.path().join(name), 4)));
    assert_says(&open("a.txt"), &["a.txt", "found 4 tokens, and a sample takes 5", "lower data.context"]);
    assert_says(&open("empty.txt"), &["empty.txt", "found no text"]);
    assert_says(&open("d"), &["found no text, expected files .txt, ", "name one file to read it whatever"]);
    assert_says(&open("e"), &["a.txt.gz", "cannot be unpacked", "get it again"]);
    assert_says(&open("nothing"), &["cannot read", "data.path"]);
}

#[test]
fn text_that_changes_under_the_run_is_noticed() {
    let folder = folder(&[("a.txt", b"0123456789")]);
    let path = folder.path().join("a.txt");
    let data = DataSet::open(&of(&path, 2)).unwrap();
    fs::write(&path, b"0123456789x").unwrap();
    let refused = refusal(data.read_all(&[0]));
    assert_says(&refused, &["a.txt", "was changed while it was in use", "put it back"]);
}

#[test]
fn samples_of_text_are_left_out_by_their_numbers() {
    let folder = folder(&[("a.txt", b"0123456789abc")]);
    let leave = |after_step, files: &[&str]| {
        let files = files.iter().map(ToString::to_string).collect();
        Exclusion { after_step, after_phase: 0, names: None, files }
    };
    let job = of(&folder.path().join("a.txt"), 2);
    let whole = DataSet::open(&job).unwrap();
    let open = |exclusions| DataSet::open(&Data { exclusions, ..job.clone() });
    let some = open(vec![leave(0, &["1"]), leave(3, &["4"])]).unwrap();
    assert_eq!((whole.len(), some.len(), some.left_out()), (6, 5, &[3][..]));
    assert_eq!(all(&some), ["012", "456", "678", "89a", "abc"].map(bytes));
    assert_ne!(whole.fingerprint(), some.fingerprint());
    assert_says(&refusal(open(vec![leave(3, &["6"])])), &["no sample 6"]);
    let every: Vec<String> = (0..6).map(|number| number.to_string()).collect();
    let every: Vec<&str> = every.iter().map(String::as_str).collect();
    assert_says(&refusal(open(vec![leave(3, &every)])), &["leaves out every sample"]);
}

#[test]
fn batches_of_text_come_in_the_order_of_the_stream() {
    let text: Vec<u8> = (0..=200).collect();
    let folder = folder(&[("a.txt", &text)]);
    let data = Arc::new(DataSet::open(&of(&folder.path().join("a.txt"), 10)).unwrap());
    let plan = Plan {
        seed: 5,
        data_shards: 4,
        shard_batch: 3,
        phases: 1,
        shards: 1..3,
        first_step: 7,
        first_phase: 0,
        end_step: 12,
        depth: 2,
        changes: Vec::new(),
    };
    let mut batches = Prefetcher::start(data.clone(), plan);
    let mut stream = SampleStream::new(5, 20);
    for step in 7..12 {
        let batch = batches.next().unwrap();
        let (mut expected, mut ledger) = (Vec::new(), 0_u64);
        for shard in 1..3 {
            let first = StreamShape { phases: 1, data_shards: 4, shard_batch: 3 }.first(step, 0, shard);
            for q in first..first + 3 {
                let sample = stream.sample(q);
                expected.extend((0..11).map(|place| i64::try_from(sample * 10 + place).unwrap()));
                ledger = ledger.wrapping_add(ledger_term(q, sample));
            }
        }
        assert!(matches!(&batch.values, Values::Tokens(tokens) if *tokens == expected), "step {step}");
        assert_eq!(batch.ledger, ledger);
        batches.recycle(batch);
    }
}
