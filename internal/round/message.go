package round

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/fxamacker/cbor/v2"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// Hash names records, models, optimizer states and gradients.
type Hash = treehash.Hash

// Peer is a member's index in the roster. Sets are in this order, and so are
// the sums over them.
type Peer uint16

// String returns the number that people know the peer by, which counts from
// 1. Traces print the index.
func (p Peer) String() string { return strconv.Itoa(int(p) + 1) }

// Bounds on everything that comes from outside.
const (
	// MaxPeers is the largest roster.
	MaxPeers = 256
	// MaxMessageBytes bounds one envelope: a ballot or a record of MaxPeers
	// entries fits.
	MaxMessageBytes = 32 << 10
	// MaxSlot bounds slots, heights and counters, so that no sum of two
	// overflows and no liar can use them up.
	MaxSlot = 1 << 48
	// MaxGradientBytes bounds the size that an announcement may claim.
	MaxGradientBytes = 1 << 36
)

// Codecs of bodies. The hash is of the encoded bytes.
const (
	CodecFloat32 = 0 // raw little-endian float32 values
	CodecFloat16 = 1 // IEEE 754 binary16, little-endian
)

const (
	messageDomain = "spirt/1 message\x00"
	recordDomain  = "spirt/1 record\x00"
)

// Type tells the messages apart; its values are on the wire.
type Type uint8

// The messages of one round, in their order, and Return.
const (
	TypeAnnounce Type = 1
	TypeBallot   Type = 2
	TypeRecord   Type = 3
	TypeReturn   Type = 4
)

func (t Type) String() string {
	switch t {
	case TypeAnnounce:
		return "announce"
	case TypeBallot:
		return "ballot"
	case TypeRecord:
		return "record"
	case TypeReturn:
		return "return"
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// Message is what one peer says about one slot on one parent. An honest peer
// never signs two different messages of one type for one slot and parent.
type Message struct {
	From   Peer
	Slot   uint64
	Parent Hash
	Body   Body
}

// Type returns the type of the body.
func (m Message) Type() Type { return m.Body.messageType() }

// Body is one of Announce, Ballot, SignedRecord and Return.
type Body interface {
	messageType() Type
	validate(m *Message) error
	wire() any
}

// Validation is a result on the validation set, in integers so that everyone
// decides alike. A zero Count means that there is none.
type Validation struct {
	LossMicro int64  // mean loss in millionths
	Correct   uint32 // how many of Count were right
	Count     uint32
}

// Announce offers this peer's averaged gradient at the parent's model. With
// Bytes zero it says that there will be none in this slot (an abstention), so
// that nobody waits for it.
type Announce struct {
	Gradient   Hash
	Bytes      uint64
	Codec      uint8
	Validation Validation // of a model of this chain that the host knows by the height
	BaseModel  Hash       // the parent's model
}

// Abstains reports whether there is no gradient.
func (a Announce) Abstains() bool { return a.Bytes == 0 }

// Entry is one gradient of a ballot or of a record's set.
type Entry struct {
	Peer     Peer
	Gradient Hash
}

// Ballot lists the gradients whose bodies its signer holds and has checked,
// by ascending peer.
type Ballot struct {
	Entries []Entry
}

// Record is one finished round: the gradients that went into it, and what
// followed from them. All honest signers of one outcome name the same record.
type Record struct {
	Slot   uint64
	Height uint64 // number of the round; genesis has 0
	Parent Hash   // the parent record's ID; genesis has the job's
	Set    []Entry
	FUsed  uint16 // what a robust rule may tolerate here: min(f, (|set|-1)/2)
	// Validation is the median over the set's announcements, each of its two
	// figures by itself: it judges the parent's model.
	Validation Validation
	Model      Hash // of the parameters, then buffers
	State      Hash // of the optimizer's state
}

// Genesis returns the record of height 0, which nobody signs: it binds the
// chain to the job and to the model that it starts from.
func Genesis(job, model, state Hash) Record {
	return Record{Parent: job, Model: model, State: state}
}

// ID names the record's content. It does not depend on who signed it.
func (r *Record) ID() Hash {
	b := append(make([]byte, 0, 256+40*len(r.Set)), recordDomain...)
	return treehash.Sum(append(b, mustEncode(wireContent{
		Slot: r.Slot, Parent: r.Parent, Record: wireRecord(r),
	})...))
}

// Degraded reports whether the set is too small for a rule that tolerates f.
func (r *Record) Degraded(f int) bool { return r.Height > 0 && len(r.Set) < 2*f+1 }

// Has reports whether a gradient of p is in the set.
func (r *Record) Has(p Peer) bool {
	return slices.ContainsFunc(r.Set, func(e Entry) bool { return e.Peer == p })
}

// SignedRecord is a record with its signer's own marks. Signing it is also the
// vote for it as head: the one with the highest counter is the latest.
type SignedRecord struct {
	Record  Record
	Counter uint64
	// TimedOut says that a timeout of the signer fired in this slot, so that
	// another run with the same seed may differ.
	TimedOut bool
}

// Return says that its signer is at the parent and works on the slot, and asks
// to be waited for. A peer sends it where the head was made without it, after a
// restart, and after a slot that failed. It carries the parent's content, so
// that peers that lost their memory see how their heads are linked.
type Return struct {
	Head Record
}

func (Announce) messageType() Type     { return TypeAnnounce }
func (Ballot) messageType() Type       { return TypeBallot }
func (SignedRecord) messageType() Type { return TypeRecord }
func (Return) messageType() Type       { return TypeReturn }

// What is on the wire: arrays, so that there is one encoding of each value.
type (
	wireEnvelope struct {
		_         struct{} `cbor:",toarray"`
		Message   []byte
		Signature []byte
	}
	wireMessage struct {
		_      struct{} `cbor:",toarray"`
		Job    Hash
		Roster Hash
		Type   Type
		From   Peer
		Slot   uint64
		Parent Hash
		Body   cbor.RawMessage
	}
	wireValidation struct {
		_         struct{} `cbor:",toarray"`
		LossMicro int64
		Correct   uint32
		Count     uint32
	}
	wireAnnounce struct {
		_          struct{} `cbor:",toarray"`
		Gradient   Hash
		Bytes      uint64
		Codec      uint8
		Validation *wireValidation
		BaseModel  Hash
	}
	wireEntry struct {
		_        struct{} `cbor:",toarray"`
		Peer     Peer
		Gradient Hash
	}
	wireRecordContent struct {
		_          struct{} `cbor:",toarray"`
		Height     uint64
		Set        []wireEntry
		FUsed      uint16
		Validation *wireValidation
		Model      Hash
		State      Hash
	}
	wireSigned struct {
		_        struct{} `cbor:",toarray"`
		Counter  uint64
		TimedOut bool
		Record   wireRecordContent
	}
	// wireContent is what a record's ID is the hash of.
	wireContent struct {
		_      struct{} `cbor:",toarray"`
		Slot   uint64
		Parent Hash
		Record wireRecordContent
	}
)

var encoding, decoding = cborModes()

func cborModes() (cbor.EncMode, cbor.DecMode) {
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic(err)
	}
	dec, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		MaxNestedLevels:   8,
		MaxArrayElements:  MaxPeers,
		MaxMapPairs:       16,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return enc, dec
}

// mustEncode encodes a value of this package's own wire types, which cannot
// fail.
func mustEncode(v any) []byte {
	b, err := encoding.Marshal(v)
	if err != nil {
		panic("round: encoding a message: " + err.Error())
	}
	return b
}

func wireEntries(set []Entry) []wireEntry {
	out := make([]wireEntry, len(set))
	for i, e := range set {
		out[i] = wireEntry{Peer: e.Peer, Gradient: e.Gradient}
	}
	return out
}

func entries(set []wireEntry) []Entry {
	out := make([]Entry, len(set))
	for i, e := range set {
		out[i] = Entry{Peer: e.Peer, Gradient: e.Gradient}
	}
	return out
}

func wireValidationOf(v Validation) *wireValidation {
	if v.Count == 0 {
		return nil
	}
	return &wireValidation{LossMicro: v.LossMicro, Correct: v.Correct, Count: v.Count}
}

func (w *wireValidation) validation() Validation {
	if w == nil {
		return Validation{}
	}
	return Validation{LossMicro: w.LossMicro, Correct: w.Correct, Count: w.Count}
}

func wireRecord(r *Record) wireRecordContent {
	return wireRecordContent{
		Height: r.Height, Set: wireEntries(r.Set), FUsed: r.FUsed,
		Validation: wireValidationOf(r.Validation), Model: r.Model, State: r.State,
	}
}

func (w *wireRecordContent) record(slot uint64, parent Hash) Record {
	return Record{
		Slot: slot, Height: w.Height, Parent: parent, Set: entries(w.Set),
		FUsed: w.FUsed, Validation: w.Validation.validation(), Model: w.Model, State: w.State,
	}
}

func (a Announce) wire() any {
	return wireAnnounce{
		Gradient: a.Gradient, Bytes: a.Bytes, Codec: a.Codec,
		Validation: wireValidationOf(a.Validation), BaseModel: a.BaseModel,
	}
}

func (b Ballot) wire() any { return wireEntries(b.Entries) }

func (s SignedRecord) wire() any {
	return wireSigned{Counter: s.Counter, TimedOut: s.TimedOut, Record: wireRecord(&s.Record)}
}

func (r Return) wire() any {
	return wireContent{Slot: r.Head.Slot, Parent: r.Head.Parent, Record: wireRecord(&r.Head)}
}

func decodeBody(t Type, raw []byte, slot uint64, parent Hash) (Body, error) {
	switch t {
	case TypeAnnounce:
		var w wireAnnounce
		if err := decoding.Unmarshal(raw, &w); err != nil {
			return nil, err
		}
		return Announce{
			Gradient: w.Gradient, Bytes: w.Bytes, Codec: w.Codec,
			Validation: w.Validation.validation(), BaseModel: w.BaseModel,
		}, nil
	case TypeBallot:
		var w []wireEntry
		if err := decoding.Unmarshal(raw, &w); err != nil {
			return nil, err
		}
		return Ballot{Entries: entries(w)}, nil
	case TypeRecord:
		var w wireSigned
		if err := decoding.Unmarshal(raw, &w); err != nil {
			return nil, err
		}
		return SignedRecord{Counter: w.Counter, TimedOut: w.TimedOut, Record: w.Record.record(slot, parent)}, nil
	case TypeReturn:
		var w wireContent
		if err := decoding.Unmarshal(raw, &w); err != nil {
			return nil, err
		}
		return Return{Head: w.Record.record(w.Slot, w.Parent)}, nil
	}
	return nil, fmt.Errorf("unknown message type %d: the sender may run a newer version", uint8(t))
}

func (v Validation) validate() error {
	if v.Correct > v.Count {
		return fmt.Errorf("validation counts %d right of %d", v.Correct, v.Count)
	}
	if v.Count == 0 && v != (Validation{}) {
		return errors.New("validation without a count")
	}
	return nil
}

func validateEntries(set []Entry) error {
	if len(set) > MaxPeers {
		return fmt.Errorf("%d entries, more than %d", len(set), MaxPeers)
	}
	for i, e := range set {
		if i > 0 && set[i-1].Peer >= e.Peer {
			return fmt.Errorf("entry %d: peer %s after peer %s", i, e.Peer, set[i-1].Peer)
		}
		if e.Gradient == (Hash{}) {
			return fmt.Errorf("entry %d: peer %s without a gradient", i, e.Peer)
		}
	}
	return nil
}

func (a Announce) validate(*Message) error {
	if a.Bytes > MaxGradientBytes {
		return fmt.Errorf("announces %d bytes, more than %d", a.Bytes, uint64(MaxGradientBytes))
	}
	if (a.Bytes == 0) != (a.Gradient == (Hash{})) {
		return errors.New("announces a gradient without a size, or a size without a gradient")
	}
	if a.Codec > CodecFloat16 {
		return fmt.Errorf("unknown codec %d: the sender may run a newer version", a.Codec)
	}
	return a.Validation.validate()
}

func (b Ballot) validate(*Message) error { return validateEntries(b.Entries) }

func (s SignedRecord) validate(m *Message) error {
	switch {
	case s.Record.Slot != m.Slot || s.Record.Parent != m.Parent:
		return errors.New("record of another slot or parent than its message")
	case s.Counter == 0 || s.Counter > MaxSlot:
		return fmt.Errorf("counter %d out of range", s.Counter)
	}
	return s.Record.validate()
}

func (r *Record) validate() error {
	switch {
	case r.Height == 0 || r.Height > r.Slot:
		return fmt.Errorf("height %d does not fit slot %d", r.Height, r.Slot)
	case len(r.Set) == 0:
		return errors.New("record with an empty set")
	case int(r.FUsed) > (len(r.Set)-1)/2:
		return fmt.Errorf("f used %d is too large for %d gradients", r.FUsed, len(r.Set))
	}
	if err := r.Validation.validate(); err != nil {
		return err
	}
	return validateEntries(r.Set)
}

func (r Return) validate(m *Message) error {
	if r.Head.Slot >= m.Slot || r.Head.ID() != m.Parent {
		return errors.New("its head is not the parent")
	}
	return r.Head.validate()
}

// validate checks what does not depend on the job.
func (m *Message) validate() error {
	if m.Slot == 0 || m.Slot > MaxSlot {
		return fmt.Errorf("slot %d out of range", m.Slot)
	}
	return m.Body.validate(m)
}

// encodeMessage returns the bytes that are signed, without the domain.
func encodeMessage(job, roster Hash, m *Message) []byte {
	return mustEncode(wireMessage{
		Job: job, Roster: roster, Type: m.Type(), From: m.From, Slot: m.Slot, Parent: m.Parent,
		Body: mustEncode(m.Body.wire()),
	})
}

func signedBytes(message []byte) []byte {
	return append(append(make([]byte, 0, len(messageDomain)+len(message)), messageDomain...), message...)
}

// Sign encodes and signs a message of this machine's own peer. The id names
// the message, whatever the signature's bits.
func Sign(key ed25519.PrivateKey, job, roster Hash, m Message) (envelope []byte, id Hash, err error) {
	if err := m.validate(); err != nil {
		return nil, Hash{}, fmt.Errorf("signing a %s for slot %d: %w", m.Type(), m.Slot, err)
	}
	message := encodeMessage(job, roster, &m)
	signed := signedBytes(message)
	envelope = mustEncode(wireEnvelope{Message: message, Signature: ed25519.Sign(key, signed)})
	if len(envelope) > MaxMessageBytes {
		return nil, Hash{}, fmt.Errorf("signing a %s for slot %d: %d bytes, more than %d", m.Type(), m.Slot, len(envelope), MaxMessageBytes)
	}
	return envelope, treehash.Sum(signed), nil
}

// Open decodes an envelope and checks everything that can be checked without
// the run's history: bounds, canonical form (one value has one encoding), job,
// roster, membership and signature. It is safe for concurrent use and keeps no
// part of the envelope.
func Open(envelope []byte, job, roster Hash, members []ed25519.PublicKey) (Message, Hash, error) {
	m, id, err := open(envelope, job, roster, members)
	if err != nil {
		return Message{}, Hash{}, fmt.Errorf("refused message: %w", err)
	}
	return m, id, nil
}

func open(envelope []byte, job, roster Hash, members []ed25519.PublicKey) (m Message, id Hash, err error) {
	if len(envelope) > MaxMessageBytes {
		return m, id, fmt.Errorf("%d bytes, more than %d", len(envelope), MaxMessageBytes)
	}
	var e wireEnvelope
	if err := decoding.Unmarshal(envelope, &e); err != nil {
		return m, id, err
	}
	if len(e.Signature) != ed25519.SignatureSize {
		return m, id, fmt.Errorf("signature of %d bytes", len(e.Signature))
	}
	var w wireMessage
	if err := decoding.Unmarshal(e.Message, &w); err != nil {
		return m, id, err
	}
	switch {
	case w.Job != job:
		return m, id, fmt.Errorf("it is of job %s, not %s", w.Job.Short(), job.Short())
	case w.Roster != roster:
		return m, id, fmt.Errorf("it is of roster %s, not %s", w.Roster.Short(), roster.Short())
	case int(w.From) >= len(members):
		return m, id, fmt.Errorf("peer %s is not one of the %d on the roster", w.From, len(members))
	}
	body, err := decodeBody(w.Type, w.Body, w.Slot, w.Parent)
	if err != nil {
		return m, id, fmt.Errorf("%s of peer %s: %w", w.Type, w.From, err)
	}
	m = Message{From: w.From, Slot: w.Slot, Parent: w.Parent, Body: body}
	if err := m.validateFor(len(members)); err != nil {
		return m, id, fmt.Errorf("%s of peer %s: %w", w.Type, w.From, err)
	}
	if !bytes.Equal(encodeMessage(job, roster, &m), e.Message) || !bytes.Equal(mustEncode(e), envelope) {
		return m, id, fmt.Errorf("%s of peer %s: not in canonical form", w.Type, w.From)
	}
	signed := signedBytes(e.Message)
	if !ed25519.Verify(members[w.From], signed, e.Signature) {
		return m, id, fmt.Errorf("%s of peer %s: the signature is not this peer's", w.Type, w.From)
	}
	return m, treehash.Sum(signed), nil
}

// validateFor checks a message against a roster of n.
func (m *Message) validateFor(n int) error {
	if err := m.validate(); err != nil {
		return err
	}
	var set []Entry
	switch b := m.Body.(type) {
	case Ballot:
		set = b.Entries
	case SignedRecord:
		set = b.Record.Set
	case Return:
		set = b.Head.Set
	}
	if len(set) > 0 && int(set[len(set)-1].Peer) >= n {
		return fmt.Errorf("names peer %s, but the roster has %d", set[len(set)-1].Peer, n)
	}
	return nil
}

// String returns the message in one line, for traces.
func (m Message) String() string {
	s := fmt.Sprintf("%s from %d slot %d on %s", m.Type(), m.From, m.Slot, m.Parent.Short())
	switch b := m.Body.(type) {
	case Announce:
		if b.Abstains() {
			return s + ": none"
		}
		return s + ": " + b.Gradient.Short()
	case Ballot:
		return s + ": " + describeSet(b.Entries)
	case SignedRecord:
		id := b.Record.ID()
		s += fmt.Sprintf(": %s height %d set %s counter %d", id.Short(), b.Record.Height, describeSet(b.Record.Set), b.Counter)
		if b.TimedOut {
			s += " timed out"
		}
	}
	return s
}

func describeSet(set []Entry) string {
	b := []byte{'{'}
	for i, e := range set {
		if i > 0 {
			b = append(b, ' ')
		}
		b = fmt.Appendf(b, "%d", e.Peer)
	}
	return string(append(b, '}'))
}
