package round

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt/internal/treehash"
)

var update = flag.Bool("update", false, "write the golden vectors anew")

func testKey(p Peer) ed25519.PrivateKey {
	seed := treehash.Sum(fmt.Appendf(nil, "key of peer %d", p))
	return ed25519.NewKeyFromSeed(seed[:])
}

func testMembers(n int) []ed25519.PublicKey {
	var m []ed25519.PublicKey
	for p := range n {
		m = append(m, testKey(Peer(p)).Public().(ed25519.PublicKey))
	}
	return m
}

func h(s string) Hash { return treehash.Sum([]byte(s)) }

var (
	testJob    = h("job")
	testRoster = h("roster")
)

func testMessages() []Message {
	parent := h("parent")
	full := Record{
		Slot: 9, Height: 7, Parent: parent, FUsed: 1,
		Set:        []Entry{{0, h("g0")}, {2, h("g2")}, {3, h("g3")}},
		Validation: Validation{LossMicro: 312345, Correct: 950, Count: 1000},
		Model:      h("model"), State: h("state"),
	}
	bare := full
	bare.Validation, bare.Set, bare.FUsed = Validation{}, full.Set[:1], 0
	return []Message{
		{From: 1, Slot: 9, Parent: parent, Body: Announce{Gradient: h("g1"), Bytes: 177704, Validation: full.Validation, BaseModel: h("base")}},
		{From: 1, Slot: 9, Parent: parent, Body: Announce{Gradient: h("g1"), Bytes: 177704, Validation: Validation{LossMicro: -5, Count: 3}, BaseModel: h("base")}},
		{From: 2, Slot: 9, Parent: parent, Body: Announce{BaseModel: h("base")}},
		{From: 3, Slot: 9, Parent: parent, Body: Ballot{Entries: full.Set}},
		{From: 3, Slot: 9, Parent: parent, Body: Ballot{Entries: []Entry{}}},
		{From: 0, Slot: 9, Parent: parent, Body: SignedRecord{Record: full, Counter: 300}},
		{From: 0, Slot: 9, Parent: parent, Body: SignedRecord{Record: bare, Counter: 1 << 40, TimedOut: true}},
		{From: 2, Slot: 10, Parent: full.ID(), Body: Return{Head: full}},
	}
}

// The golden file holds, for each message, a comment, the envelope and the
// message's id (and a record's), so that another implementation can be checked
// against it.
func TestGoldenVectors(t *testing.T) {
	const path = "testdata/messages.hex"
	var out strings.Builder
	fmt.Fprintf(&out, "# Signed messages of four peers. job %s\n# roster %s\n", testJob, testRoster)
	for p, k := range testMembers(4) {
		fmt.Fprintf(&out, "key %d %x\n", p, []byte(k))
	}
	for _, m := range testMessages() {
		envelope, id, err := Sign(testKey(m.From), testJob, testRoster, m)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "# %v\nenvelope %x\nid %s\n", m, envelope, id)
		if r, ok := m.Body.(SignedRecord); ok {
			fmt.Fprintf(&out, "record %s\n", r.Record.ID())
		}
	}
	if *update {
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != string(want) {
		t.Errorf("the encoding has changed; peers of different builds would not understand each other\ngot:\n%s", out.String())
	}
}

func TestOpenGivesWhatWasSigned(t *testing.T) {
	members := testMembers(4)
	for _, m := range testMessages() {
		envelope, id, err := Sign(testKey(m.From), testJob, testRoster, m)
		if err != nil {
			t.Fatal(err)
		}
		got, gotID, err := Open(envelope, testJob, testRoster, members)
		if err != nil {
			t.Fatalf("%v: %v", m, err)
		}
		if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", m) || gotID != id {
			t.Errorf("got %+v\nwant %+v", got, m)
		}
		for i := range envelope {
			bad := bytes.Clone(envelope)
			bad[i] ^= 1
			if _, _, err := Open(bad, testJob, testRoster, members); err == nil {
				t.Fatalf("%v: accepted with byte %d changed", m, i)
			}
		}
		if _, _, err := Open(append(bytes.Clone(envelope), 0), testJob, testRoster, members); err == nil {
			t.Errorf("%v: accepted with a trailing byte", m)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	members := testMembers(4)
	valid := testMessages()[0]
	sign := func(p Peer, m Message) []byte {
		message := encodeMessage(testJob, testRoster, &m)
		return mustEncode(wireEnvelope{Message: message, Signature: ed25519.Sign(testKey(p), signedBytes(message))})
	}
	with := func(b Body) []byte {
		m := valid
		m.Body = b
		return sign(m.From, m)
	}
	record := testMessages()[5].Body.(SignedRecord)
	changed := func(f func(*SignedRecord)) []byte {
		r := record
		r.Record.Set = append([]Entry(nil), r.Record.Set...)
		f(&r)
		return with(r)
	}
	stranger := valid
	stranger.From = 4
	early := valid
	early.Slot = 0
	late := valid
	late.Slot = MaxSlot + 1
	envelope := sign(1, valid)
	for name, tc := range map[string]struct {
		envelope    []byte
		job, roster Hash
		want        string
	}{
		"another job":     {envelope, h("x"), testRoster, "of job"},
		"another roster":  {envelope, testJob, h("x"), "of roster"},
		"stranger":        {sign(4, stranger), testJob, testRoster, "not one of the 4 on the roster"},
		"impersonation":   {sign(2, valid), testJob, testRoster, "not this peer's"},
		"slot zero":       {sign(1, early), testJob, testRoster, "out of range"},
		"slot too large":  {sign(1, late), testJob, testRoster, "out of range"},
		"too long":        {make([]byte, MaxMessageBytes+1), testJob, testRoster, "bytes, more than"},
		"size alone":      {with(Announce{Bytes: 5}), testJob, testRoster, "a size without a gradient"},
		"too many bytes":  {with(Announce{Gradient: h("g"), Bytes: MaxGradientBytes + 1}), testJob, testRoster, "more than"},
		"another head":    {with(Return{Head: record.Record}), testJob, testRoster, "not the parent"},
		"codec":           {with(Announce{Gradient: h("g"), Bytes: 1, Codec: 9}), testJob, testRoster, "unknown codec 9"},
		"more than all":   {with(Announce{Gradient: h("g"), Bytes: 1, Validation: Validation{Correct: 2, Count: 1}}), testJob, testRoster, "2 right of 1"},
		"order":           {with(Ballot{Entries: []Entry{{2, h("a")}, {1, h("b")}}}), testJob, testRoster, "peer 2 after peer 3"},
		"twice":           {with(Ballot{Entries: []Entry{{2, h("a")}, {2, h("b")}}}), testJob, testRoster, "peer 3 after peer 3"},
		"unknown peer":    {with(Ballot{Entries: []Entry{{7, h("a")}}}), testJob, testRoster, "names peer 8"},
		"no gradient":     {with(Ballot{Entries: []Entry{{1, Hash{}}}}), testJob, testRoster, "without a gradient"},
		"empty set":       {changed(func(r *SignedRecord) { r.Record.Set = nil }), testJob, testRoster, "empty set"},
		"counter":         {changed(func(r *SignedRecord) { r.Counter = 0 }), testJob, testRoster, "counter 0"},
		"height":          {changed(func(r *SignedRecord) { r.Record.Height = 10 }), testJob, testRoster, "does not fit slot"},
		"f":               {changed(func(r *SignedRecord) { r.Record.FUsed = 2 }), testJob, testRoster, "f used 2"},
		"not CBOR":        {[]byte{0xff}, testJob, testRoster, "refused message"},
		"nothing":         {nil, testJob, testRoster, "refused message"},
		"indefinite":      {append([]byte{0x9f}, append(envelope[1:], 0xff)...), testJob, testRoster, "indefinite"},
		"short signature": {mustEncode(wireEnvelope{Message: []byte{1}, Signature: []byte{1}}), testJob, testRoster, "signature of 1 bytes"},
	} {
		_, _, err := Open(tc.envelope, tc.job, tc.roster, members)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, tc.want)
		}
	}
}

// One value has one encoding: a longer integer form is refused though it means
// the same and is signed.
func TestOpenRefusesOtherForms(t *testing.T) {
	m := testMessages()[7]
	message := encodeMessage(testJob, testRoster, &m)
	at := bytes.Index(message, append([]byte{4, 2}, 10)) + 2 // type, from, slot
	long := append(bytes.Clone(message[:at]), 0x18, 10)
	long = append(long, message[at+1:]...)
	envelope := mustEncode(wireEnvelope{Message: long, Signature: ed25519.Sign(testKey(m.From), signedBytes(long))})
	if _, _, err := Open(envelope, testJob, testRoster, testMembers(4)); err == nil || !strings.Contains(err.Error(), "canonical") {
		t.Errorf("error %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	members := testMembers(4)
	for _, m := range testMessages() {
		envelope, _, err := Sign(testKey(m.From), testJob, testRoster, m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(envelope)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, id, err := Open(b, testJob, testRoster, members)
		if err != nil {
			return
		}
		// Nobody but the test signs, so it is one of the seeds.
		again, id2, err := Sign(testKey(m.From), testJob, testRoster, m)
		if err != nil || id2 != id || !bytes.Equal(again, b) {
			t.Errorf("accepted %x, which is not how it is signed", b)
		}
	})
}

// FuzzBody decodes bodies of every type: what is accepted encodes to the same
// bytes, or is refused as not canonical; nothing panics.
func FuzzBody(f *testing.F) {
	for _, m := range testMessages() {
		f.Add(uint8(m.Type()), mustEncode(m.Body.wire()))
	}
	f.Fuzz(func(t *testing.T, typ uint8, raw []byte) {
		body, err := decodeBody(Type(typ), raw, 9, h("parent"))
		if err != nil {
			return
		}
		m := Message{From: 1, Slot: 9, Parent: h("parent"), Body: body}
		if m.validateFor(4) != nil {
			return
		}
		once := mustEncode(body.wire())
		again, err := decodeBody(Type(typ), once, 9, h("parent"))
		if err != nil || !bytes.Equal(mustEncode(again.wire()), once) {
			t.Errorf("%x decodes to %+v, which encodes to %x", raw, body, once)
		}
		_ = m.String()
	})
}

func TestRecordIDIsOfTheContent(t *testing.T) {
	r := testMessages()[5].Body.(SignedRecord).Record
	id := r.ID()
	for name, f := range map[string]func(*Record){
		"slot":       func(r *Record) { r.Slot++ },
		"height":     func(r *Record) { r.Height++ },
		"parent":     func(r *Record) { r.Parent[0]++ },
		"set":        func(r *Record) { r.Set = r.Set[1:] },
		"f":          func(r *Record) { r.FUsed = 0 },
		"validation": func(r *Record) { r.Validation.Correct++ },
		"model":      func(r *Record) { r.Model[31]++ },
		"state":      func(r *Record) { r.State[31]++ },
	} {
		c := r
		f(&c)
		if c.ID() == id {
			t.Errorf("another %s, the same ID", name)
		}
	}
}

func BenchmarkSignOpen(b *testing.B) {
	members := testMembers(4)
	m := testMessages()[5]
	key := testKey(m.From)
	for b.Loop() {
		envelope, _, err := Sign(key, testJob, testRoster, m)
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := Open(envelope, testJob, testRoster, members); err != nil {
			b.Fatal(err)
		}
	}
}

func TestHexFileIsHex(t *testing.T) {
	b, err := os.ReadFile("testdata/messages.hex")
	if err != nil {
		t.Fatal(err)
	}
	members := testMembers(4)
	for _, line := range strings.Split(string(b), "\n") {
		x, ok := strings.CutPrefix(line, "envelope ")
		if !ok {
			continue
		}
		envelope, err := hex.DecodeString(x)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := Open(envelope, testJob, testRoster, members); err != nil {
			t.Error(err)
		}
	}
}
