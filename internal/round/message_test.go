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

func testKeys(n int) Keys {
	members := testMembers(n)
	return func(roster Hash) ([]ed25519.PublicKey, bool) { return members, roster == testRoster }
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
		Position: 28, Roster: testRoster, Expelled: []Peer{1}, Justified: Checkpoint{Height: 4, ID: h("checkpoint"), Roster: h("old roster")},
		Convergence: Convergence{Count: 3, Best: 300000, Stale: 2}, Stop: StopMoney,
	}
	bare := full
	bare.Expelled = nil
	bare.Convergence, bare.Stop = Convergence{}, GoOn
	bare.Validation, bare.Set, bare.FUsed = Validation{}, full.Set[:1], 0
	messages := []Message{
		{From: 1, Slot: 9, Parent: parent, Body: Announce{Gradient: h("g1"), Bytes: 177704, Validation: full.Validation, BaseModel: h("base"), Spent: 123456789, Stop: StopTime}},
		{From: 1, Slot: 9, Parent: parent, Body: Announce{Gradient: h("g1"), Bytes: 177704, Validation: Validation{LossMicro: -5, Count: 3}, BaseModel: h("base")}},
		{From: 2, Slot: 9, Parent: parent, Body: Announce{BaseModel: h("base")}},
		{From: 3, Slot: 9, Parent: parent, Body: Ballot{Entries: full.Set}},
		{From: 3, Slot: 9, Parent: parent, Body: Ballot{Entries: []Entry{}}},
		{From: 0, Slot: 9, Parent: parent, Body: SignedRecord{Record: full, Counter: 300}},
		{From: 0, Slot: 9, Parent: parent, Body: SignedRecord{Record: bare, Counter: 1 << 40, TimedOut: true}},
		{From: 2, Slot: 10, Parent: full.ID(), Body: Return{Head: full}},
		{From: 2, Slot: 11, Parent: full.ID(), Body: Return{Counter: 301, Head: full}},
		{From: 3, Slot: 9, Parent: parent, Body: Ballot{Entries: full.Set, Expelled: []Peer{1}, Justified: full.Justified, Roster: h("next roster")}},
		{From: 1, Slot: 7, Parent: full.ID(), Body: Vote{Target: full}},
		{From: 2, Slot: 1, Body: RosterNotice{Data: []byte("a roster")}},
		{From: 2, Slot: 4, Body: Contact{Addresses: []string{"/ip4/192.0.2.1/tcp/7000"}}},
		{From: 2, Slot: 5, Body: Petition{Data: []byte("a petition")}},
		{From: 1, Slot: 9, Parent: parent, Body: Announce{Gradient: h("g1"), Bytes: 88852, Codec: CodecFloat16, BaseModel: h("base")}},
	}
	for i := range messages {
		messages[i].Roster = testRoster
	}
	two := [2][]byte{}
	for i, g := range []string{"one", "other"} {
		m := Message{From: 3, Slot: 9, Parent: parent, Roster: testRoster, Body: Announce{Gradient: h(g), Bytes: 4, BaseModel: h("base")}}
		two[i], _, _ = Sign(testKey(3), testJob, m)
	}
	proof, err := NewProof(two[0], two[1], testJob, testKeys(4))
	if err != nil {
		panic(err)
	}
	return append(messages, Message{From: 0, Slot: 9, Parent: parent, Roster: testRoster, Body: proof})
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
		envelope, id, err := Sign(testKey(m.From), testJob, m)
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
	for _, m := range testMessages() {
		envelope, id, err := Sign(testKey(m.From), testJob, m)
		if err != nil {
			t.Fatal(err)
		}
		got, gotID, err := Open(envelope, testJob, testKeys(4))
		if err != nil {
			t.Fatalf("%v: %v", m, err)
		}
		if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", m) || gotID != id {
			t.Errorf("got %+v\nwant %+v", got, m)
		}
		for i := range envelope {
			bad := bytes.Clone(envelope)
			bad[i] ^= 1
			if _, _, err := Open(bad, testJob, testKeys(4)); err == nil {
				t.Fatalf("%v: accepted with byte %d changed", m, i)
			}
		}
		if _, _, err := Open(append(bytes.Clone(envelope), 0), testJob, testKeys(4)); err == nil {
			t.Errorf("%v: accepted with a trailing byte", m)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	valid := testMessages()[0]
	sign := func(p Peer, m Message) []byte {
		message := encodeMessage(testJob, &m)
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
	elsewhere := valid
	elsewhere.Roster = h("x")
	stranger := valid
	stranger.From = 4
	early := valid
	early.Slot = 0
	late := valid
	late.Slot = MaxSlot + 1
	envelope := sign(1, valid)
	for name, tc := range map[string]struct {
		envelope []byte
		job      Hash
		want     string
	}{
		"another job":     {envelope, h("x"), "of job"},
		"another roster":  {sign(1, elsewhere), testJob, "not known here yet"},
		"stranger":        {sign(4, stranger), testJob, "peer 5 is not on the roster"},
		"impersonation":   {sign(2, valid), testJob, "not this peer's"},
		"slot zero":       {sign(1, early), testJob, "out of range"},
		"slot too large":  {sign(1, late), testJob, "out of range"},
		"too long":        {make([]byte, MaxMessageBytes+1), testJob, "bytes, more than"},
		"size alone":      {with(Announce{Bytes: 5}), testJob, "a size without a gradient"},
		"too many bytes":  {with(Announce{Gradient: h("g"), Bytes: MaxGradientBytes + 1}), testJob, "more than"},
		"return counter":  {sign(1, Message{From: 1, Slot: 12, Parent: record.Record.ID(), Roster: testRoster, Body: Return{Counter: MaxSlot + 1, Head: record.Record}}), testJob, "counter 281474976710657"},
		"another head":    {with(Return{Head: record.Record}), testJob, "not the parent"},
		"codec":           {with(Announce{Gradient: h("g"), Bytes: 1, Codec: 9}), testJob, "unknown codec 9"},
		"more than all":   {with(Announce{Gradient: h("g"), Bytes: 1, Validation: Validation{Correct: 2, Count: 1}}), testJob, "2 right of 1"},
		"order":           {with(Ballot{Entries: []Entry{{2, h("a")}, {1, h("b")}}}), testJob, "peer 2 after peer 3"},
		"twice":           {with(Ballot{Entries: []Entry{{2, h("a")}, {2, h("b")}}}), testJob, "peer 3 after peer 3"},
		"unknown peer":    {with(Ballot{Entries: []Entry{{7, h("a")}}}), testJob, "names peer 8"},
		"no gradient":     {with(Ballot{Entries: []Entry{{1, Hash{}}}}), testJob, "without a gradient"},
		"empty set":       {changed(func(r *SignedRecord) { r.Record.Set = nil }), testJob, "empty set"},
		"set expelled":    {changed(func(r *SignedRecord) { r.Record.Expelled = []Peer{2} }), testJob, "both in the set and expelled"},
		"expelled order":  {changed(func(r *SignedRecord) { r.Record.Expelled = []Peer{1, 1} }), testJob, "out of order"},
		"justified":       {changed(func(r *SignedRecord) { r.Record.Justified.Height = 7 }), testJob, "is not among the ancestors"},
		"another target":  {with(Vote{Target: record.Record}), testJob, "not the one that the message names"},
		"no proof":        {with(Proof{Peer: 1, A: envelope, B: envelope}), testJob, "may sign both"},
		"half a proof":    {with(Proof{Peer: 1, A: envelope}), testJob, "message 2"},
		"another's proof": {with(Proof{Peer: 2, A: envelope, B: envelope}), testJob, "is of peer 2, not of 3"},
		"large":           {with(Petition{Data: make([]byte, 17<<10)}), testJob, "petition of"},
		"addresses":       {with(Contact{Addresses: make([]string, 17)}), testJob, "17 addresses"},
		"counter":         {changed(func(r *SignedRecord) { r.Counter = 0 }), testJob, "counter 0"},
		"height":          {changed(func(r *SignedRecord) { r.Record.Height = 10 }), testJob, "does not fit slot"},
		"f":               {changed(func(r *SignedRecord) { r.Record.FUsed = 2 }), testJob, "f used 2"},
		"stop":            {changed(func(r *SignedRecord) { r.Record.Stop = 3 }), testJob, "unknown reason to stop 3"},
		"wish":            {with(Announce{Stop: 9}), testJob, "unknown reason to stop 9"},
		"convergence":     {changed(func(r *SignedRecord) { r.Record.Convergence.Stale = 3 }), testJob, "3 validations without"},
		"not CBOR":        {[]byte{0xff}, testJob, "refused message"},
		"nothing":         {nil, testJob, "refused message"},
		"indefinite":      {append([]byte{0x9f}, append(envelope[1:], 0xff)...), testJob, "indefinite"},
		"short signature": {mustEncode(wireEnvelope{Message: []byte{1}, Signature: []byte{1}}), testJob, "signature of 1 bytes"},
	} {
		_, _, err := Open(tc.envelope, tc.job, testKeys(4))
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, tc.want)
		}
	}
}

// One value has one encoding: a longer integer form is refused though it means
// the same and is signed.
func TestOpenRefusesOtherForms(t *testing.T) {
	m := testMessages()[7]
	message := encodeMessage(testJob, &m)
	at := bytes.Index(message, append([]byte{4, 2}, 10)) + 2 // type, from, slot
	long := append(bytes.Clone(message[:at]), 0x18, 10)
	long = append(long, message[at+1:]...)
	envelope := mustEncode(wireEnvelope{Message: long, Signature: ed25519.Sign(testKey(m.From), signedBytes(long))})
	if _, _, err := Open(envelope, testJob, testKeys(4)); err == nil || !strings.Contains(err.Error(), "canonical") {
		t.Errorf("error %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	for _, m := range testMessages() {
		envelope, _, err := Sign(testKey(m.From), testJob, m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(envelope)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, id, err := Open(b, testJob, testKeys(4))
		if err != nil {
			return
		}
		// Nobody but the test signs, so it is one of the seeds.
		again, id2, err := Sign(testKey(m.From), testJob, m)
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
		m := Message{From: 1, Slot: 9, Parent: h("parent"), Roster: testRoster, Body: body}
		if m.validateFor(testMembers(4)) != nil {
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

// What an honest peer signs one of, and what it may sign both of.
func TestProofs(t *testing.T) {
	parent := h("parent")
	record := testMessages()[5].Body.(SignedRecord)
	with := func(f func(*Record)) Record {
		r := record.Record
		f(&r)
		return r
	}
	other := with(func(r *Record) { r.Model = h("false") })
	later := with(func(r *Record) { r.Slot, r.Parent = 12, h("later") })
	vote := func(height, source uint64) Message {
		r := with(func(r *Record) { r.Slot, r.Height, r.Justified.Height = 99, height, source })
		return Message{Slot: height, Parent: r.ID(), Body: Vote{Target: r}}
	}
	say := func(r Record, counter uint64) Message {
		return Message{Slot: r.Slot, Parent: r.Parent, Body: SignedRecord{Record: r, Counter: counter}}
	}
	back := func(r Record, counter uint64) Message {
		return Message{Slot: r.Slot + 1, Parent: r.ID(), Body: Return{Counter: counter, Head: r}}
	}
	announce := func(g string, slot uint64) Message {
		return Message{Slot: slot, Parent: parent, Body: Announce{Gradient: h(g), Bytes: 4}}
	}
	for name, tc := range map[string]struct {
		a, b  Message
		proof bool
	}{
		"two gradients":       {announce("a", 9), announce("b", 9), true},
		"one gradient":        {announce("a", 9), announce("a", 9), false},
		"two slots":           {announce("a", 9), announce("b", 10), false},
		"two ballots":         {Message{Slot: 9, Parent: parent, Body: Ballot{}}, Message{Slot: 9, Parent: parent, Body: Ballot{Expelled: []Peer{1}}}, true},
		"types":               {announce("a", 9), Message{Slot: 9, Parent: parent, Body: Ballot{}}, false},
		"two records":         {say(record.Record, 1), say(other, 2), true},
		"one counter":         {say(record.Record, 1), say(later, 1), true},
		"a later record":      {say(record.Record, 1), say(later, 2), false},
		"to one head":         {back(record.Record, 3), say(record.Record, 3), false},
		"a return elsewhere":  {back(record.Record, 3), say(later, 3), true},
		"two returns":         {back(record.Record, 3), back(later, 3), true},
		"a later return":      {back(record.Record, 3), back(later, 4), false},
		"returns, no votes":   {back(record.Record, 0), back(later, 0), false},
		"votes for a height":  {vote(8, 4), vote(8, 0), true},
		"a vote around":       {vote(12, 0), vote(8, 4), true},
		"a vote within":       {vote(8, 4), vote(12, 0), true},
		"votes in a row":      {vote(8, 4), vote(12, 8), false},
		"votes of one source": {vote(8, 4), vote(12, 4), false},
	} {
		envelopes := [2][]byte{}
		for i, m := range []Message{tc.a, tc.b} {
			m.From, m.Roster = 2, testRoster
			var err error
			if envelopes[i], _, err = Sign(testKey(2), testJob, m); err != nil {
				t.Fatal(err)
			}
		}
		p, err := NewProof(envelopes[0], envelopes[1], testJob, testKeys(4))
		if (err == nil) != tc.proof || tc.proof && p.Peer != 2 {
			t.Errorf("%s: %v", name, err)
		}
	}
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
		"position":   func(r *Record) { r.Position++ },
		"roster":     func(r *Record) { r.Roster[3]++ },
		"expelled":   func(r *Record) { r.Expelled = nil },
		"justified":  func(r *Record) { r.Justified.ID[1]++ },
	} {
		c := r
		f(&c)
		if c.ID() == id {
			t.Errorf("another %s, the same ID", name)
		}
	}
}

func BenchmarkSignOpen(b *testing.B) {
	m := testMessages()[5]
	key := testKey(m.From)
	for b.Loop() {
		envelope, _, err := Sign(key, testJob, m)
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := Open(envelope, testJob, testKeys(4)); err != nil {
			b.Fatal(err)
		}
	}
}

func TestHexFileIsHex(t *testing.T) {
	b, err := os.ReadFile("testdata/messages.hex")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		x, ok := strings.CutPrefix(line, "envelope ")
		if !ok {
			continue
		}
		envelope, err := hex.DecodeString(x)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := Open(envelope, testJob, testKeys(4)); err != nil {
			t.Error(err)
		}
	}
}
