package round

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"math"
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
	// MaxPeers bounds member indices, and so rosters.
	MaxPeers = 1024
	// MaxMessageBytes bounds one envelope: a proof made of two envelopes of
	// maxPlainBytes fits.
	MaxMessageBytes = 100 << 10
	// maxPlainBytes bounds every envelope but a proof: a ballot or a record of
	// MaxPeers entries fits.
	maxPlainBytes = 48 << 10
	// maxAddresses and maxAddressBytes bound a contact.
	maxAddresses    = 16
	maxAddressBytes = 256
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

// ErrUnknownRoster says that a message cannot be judged before its roster is
// known.
var ErrUnknownRoster = errors.New("its roster is not known here yet")

const (
	messageDomain = "spirt/1 message\x00"
	recordDomain  = "spirt/1 record\x00"
)

// Type tells the messages apart; its values are on the wire.
type Type uint8

// The messages of one round, in their order, and Return; then those that are
// kept for whoever connects later.
const (
	TypeAnnounce Type = 1
	TypeBallot   Type = 2
	TypeRecord   Type = 3
	TypeReturn   Type = 4
	TypeVote     Type = 5
	TypeProof    Type = 6
	TypeRoster   Type = 7
	TypeContact  Type = 8
	TypePetition Type = 9
)

// Sticky reports whether messages of the type are kept for members that
// connect later, apart from those of the rounds.
func (t Type) Sticky() bool { return t >= TypeVote }

func (t Type) String() string {
	names := [...]string{"", "announce", "ballot", "record", "return", "vote", "proof", "roster", "contact", "petition"}
	if t > 0 && int(t) < len(names) {
		return names[t]
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// Message is what one peer says about one slot on one parent. An honest peer
// never signs two different messages of one type for one slot and parent.
// (A vote is one for its height whatever the parent; Proof, RosterNotice,
// Contact and Petition are not bound to slots.)
type Message struct {
	From   Peer
	Slot   uint64
	Parent Hash
	// Roster is the one that the signer is a member of: of a message about a
	// slot, the parent record's.
	Roster Hash
	Body   Body
}

// Type returns the type of the body.
func (m Message) Type() Type { return m.Body.messageType() }

// Body is one of Announce, Ballot, SignedRecord, Return, Vote, Proof,
// RosterNotice, Contact and Petition.
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

// Stop is a peer's wish to end the run for a reason that only it can know, and
// in a record that enough of them had one.
type Stop uint8

// The reasons for such a wish.
const (
	GoOn      Stop = iota
	StopTime       // the time for the run is up
	StopMoney      // the money for it is spent
)

func (s Stop) String() string { return [...]string{"go on", "time", "money"}[s] }

// Convergence is what the validations of a chain say so far. The zero value is
// that of a chain without one.
type Convergence struct {
	Count uint32 // validations
	Best  int64  // the lowest loss in millionths that was an improvement
	Stale uint32 // validations since
}

// after returns what follows with another validation, whose loss is an
// improvement if it is lower than the best by more than delta millionths.
func (c Convergence) after(v Validation, delta int64) Convergence {
	switch {
	case v.Count == 0 || c.Count == math.MaxUint32:
		return c
	case c.Count == 0 || v.LossMicro < c.Best-delta:
		return Convergence{Count: c.Count + 1, Best: v.LossMicro}
	}
	return Convergence{Count: c.Count + 1, Best: c.Best, Stale: c.Stale + 1}
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
	// Spent is what the run has cost this peer so far, in billionths of a
	// dollar. Its signer alone knows it, and nothing follows from it here.
	Spent uint64
	Stop  Stop
}

// Abstains reports whether there is no gradient.
func (a Announce) Abstains() bool { return a.Bytes == 0 }

// Entry is one gradient of a ballot or of a record's set.
type Entry struct {
	Peer     Peer
	Gradient Hash
}

// Ballot lists the gradients whose bodies its signer holds and has checked,
// by ascending peer, and what it would write into the record besides.
type Ballot struct {
	Entries []Entry
	// Expelled are members that its signer holds a proof against and that the
	// parent does not name yet, ascending.
	Expelled []Peer
	// Justified is the highest justified checkpoint that its signer knows on
	// this chain; zero if the parent names it already.
	Justified Checkpoint
	// Roster is the next one, that its signer knows; zero if there is none.
	Roster Hash
}

// Checkpoint names a record whose height is a multiple of the checkpoint
// interval, and the roster in force after it. Genesis is the first.
type Checkpoint struct {
	Height uint64
	ID     Hash
	Roster Hash
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
	// Position counts the minibatches dealt so far, this round's included:
	// the data of the next round follow from it.
	Position uint64
	// Roster is the one under which the record's children are made.
	Roster Hash
	// Expelled are the members proven guilty up to here, ascending.
	Expelled []Peer
	// Justified is the highest checkpoint among its ancestors that the signers
	// knew to be justified: what a vote for this record has as its source.
	Justified Checkpoint
	// Convergence is the parent's and Validation, together.
	Convergence Convergence
	// Stop is what enough of the set wished: at least min(f+1, |set|).
	Stop Stop
}

// Genesis returns the record of height 0, which nobody signs: it binds the
// chain to the job, to the roster and to the model that it starts from. It is
// final from the beginning.
func Genesis(job, roster, model, state Hash) Record {
	return Record{Parent: job, Roster: roster, Model: model, State: state}
}

// Checkpoint names the record.
func (r *Record) Checkpoint() Checkpoint {
	return Checkpoint{Height: r.Height, ID: r.ID(), Roster: r.Roster}
}

// ID names the record's content. It does not depend on who signed it.
func (r *Record) ID() Hash {
	b := append(make([]byte, 0, 256+40*len(r.Set)), recordDomain...)
	return treehash.Sum(append(b, mustEncode(wireContent{
		Slot: r.Slot, Parent: r.Parent, Record: wireRecord(r),
	})...))
}

// equal reports whether two records have the same content, and so one ID: that
// is quicker to see than to work out.
func (r *Record) equal(s *Record) bool {
	return r.Slot == s.Slot && r.Height == s.Height && r.Parent == s.Parent && slices.Equal(r.Set, s.Set) &&
		r.FUsed == s.FUsed && r.Validation == s.Validation && r.Model == s.Model && r.State == s.State &&
		r.Position == s.Position && r.Roster == s.Roster && slices.Equal(r.Expelled, s.Expelled) && r.Justified == s.Justified &&
		r.Convergence == s.Convergence && r.Stop == s.Stop
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
//
// Where the signer went to its head from another branch, or further along its
// own, without signing it, Counter makes the return its vote for the head, as
// that of a SignedRecord. Zero: its latest signature stays what it was.
type Return struct {
	Counter uint64
	Head    Record
}

// Vote says that its signer has the target's state on its disk, and that no
// branch without the target's justified checkpoint is its own. The message's
// slot is the target's height and its parent the target.
type Vote struct {
	Target Record
}

// Proof holds two messages that an honest peer never signs both.
type Proof struct {
	Peer Peer // who signed them
	A, B []byte
}

// RosterNotice spreads a roster, in the encoding of package membership. The
// message's slot is the roster's epoch, counted from 1.
type RosterNotice struct {
	Data []byte
}

// Contact says where its signer may be reached. The message's slot numbers its
// contacts; the highest counts.
type Contact struct {
	Addresses []string
}

// Petition passes on what a stranger asks of those who hold an admin key, in
// the encoding of package membership. The message's slot numbers its signer's
// petitions.
type Petition struct {
	Data []byte
}

func (Announce) messageType() Type     { return TypeAnnounce }
func (Ballot) messageType() Type       { return TypeBallot }
func (SignedRecord) messageType() Type { return TypeRecord }
func (Return) messageType() Type       { return TypeReturn }
func (Vote) messageType() Type         { return TypeVote }
func (Proof) messageType() Type        { return TypeProof }
func (RosterNotice) messageType() Type { return TypeRoster }
func (Contact) messageType() Type      { return TypeContact }
func (Petition) messageType() Type     { return TypePetition }

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
		Spent      uint64
		Stop       Stop
	}
	wireEntry struct {
		_        struct{} `cbor:",toarray"`
		Peer     Peer
		Gradient Hash
	}
	wireCheckpoint struct {
		_      struct{} `cbor:",toarray"`
		Height uint64
		ID     Hash
		Roster Hash
	}
	wireBallot struct {
		_         struct{} `cbor:",toarray"`
		Entries   []wireEntry
		Expelled  []Peer
		Justified *wireCheckpoint
		Roster    *Hash
	}
	wireProof struct {
		_    struct{} `cbor:",toarray"`
		Peer Peer
		A, B []byte
	}
	wireRecordContent struct {
		_          struct{} `cbor:",toarray"`
		Height     uint64
		Set        []wireEntry
		FUsed      uint16
		Validation *wireValidation
		Model      Hash
		State      Hash
		Position   uint64
		Roster     Hash
		Expelled   []Peer
		Justified  wireCheckpoint
		// Convergence is null where Count is zero.
		Convergence *wireConvergence
		Stop        Stop
	}
	wireConvergence struct {
		_     struct{} `cbor:",toarray"`
		Count uint32
		Best  int64
		Stale uint32
	}
	wireSigned struct {
		_        struct{} `cbor:",toarray"`
		Counter  uint64
		TimedOut bool
		Record   wireRecordContent
	}
	wireReturn struct {
		_       struct{} `cbor:",toarray"`
		Counter uint64
		Slot    uint64
		Parent  Hash
		Record  wireRecordContent
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
		Position: r.Position, Roster: r.Roster, Expelled: append([]Peer{}, r.Expelled...),
		Justified:   wireCheckpoint{Height: r.Justified.Height, ID: r.Justified.ID, Roster: r.Justified.Roster},
		Convergence: wireConvergenceOf(r.Convergence), Stop: r.Stop,
	}
}

func wireConvergenceOf(c Convergence) *wireConvergence {
	if c.Count == 0 {
		return nil
	}
	return &wireConvergence{Count: c.Count, Best: c.Best, Stale: c.Stale}
}

func (w *wireConvergence) convergence() Convergence {
	if w == nil {
		return Convergence{}
	}
	return Convergence{Count: w.Count, Best: w.Best, Stale: w.Stale}
}

func (w *wireRecordContent) record(slot uint64, parent Hash) Record {
	return Record{
		Slot: slot, Height: w.Height, Parent: parent, Set: entries(w.Set),
		FUsed: w.FUsed, Validation: w.Validation.validation(), Model: w.Model, State: w.State,
		Position: w.Position, Roster: w.Roster, Expelled: peersOrNil(w.Expelled),
		Justified:   Checkpoint{Height: w.Justified.Height, ID: w.Justified.ID, Roster: w.Justified.Roster},
		Convergence: w.Convergence.convergence(), Stop: w.Stop,
	}
}

func peersOrNil(p []Peer) []Peer {
	if len(p) == 0 {
		return nil
	}
	return p
}

func (a Announce) wire() any {
	return wireAnnounce{
		Gradient: a.Gradient, Bytes: a.Bytes, Codec: a.Codec,
		Validation: wireValidationOf(a.Validation), BaseModel: a.BaseModel, Spent: a.Spent, Stop: a.Stop,
	}
}

func (b *Ballot) has(e Entry) bool {
	i, ok := slices.BinarySearchFunc(b.Entries, e.Peer, func(x Entry, p Peer) int { return int(x.Peer) - int(p) })
	return ok && b.Entries[i] == e
}

func (b Ballot) wire() any {
	w := wireBallot{Entries: wireEntries(b.Entries), Expelled: append([]Peer{}, b.Expelled...)}
	if b.Justified != (Checkpoint{}) {
		w.Justified = &wireCheckpoint{Height: b.Justified.Height, ID: b.Justified.ID, Roster: b.Justified.Roster}
	}
	if b.Roster != (Hash{}) {
		w.Roster = &b.Roster
	}
	return w
}

func (s SignedRecord) wire() any {
	return wireSigned{Counter: s.Counter, TimedOut: s.TimedOut, Record: wireRecord(&s.Record)}
}

func (r Return) wire() any {
	return wireReturn{Counter: r.Counter, Slot: r.Head.Slot, Parent: r.Head.Parent, Record: wireRecord(&r.Head)}
}

func (v Vote) wire() any {
	return wireContent{Slot: v.Target.Slot, Parent: v.Target.Parent, Record: wireRecord(&v.Target)}
}

func (p Proof) wire() any { return wireProof{Peer: p.Peer, A: p.A, B: p.B} }

func (r RosterNotice) wire() any { return r.Data }

func (c Contact) wire() any { return append([]string{}, c.Addresses...) }

func (p Petition) wire() any { return p.Data }

func decodeBody(t Type, raw []byte, slot uint64, parent Hash) (Body, error) {
	switch t {
	case TypeAnnounce:
		var w wireAnnounce
		if err := decoding.Unmarshal(raw, &w); err != nil {
			return nil, err
		}
		return Announce{
			Gradient: w.Gradient, Bytes: w.Bytes, Codec: w.Codec,
			Validation: w.Validation.validation(), BaseModel: w.BaseModel, Spent: w.Spent, Stop: w.Stop,
		}, nil
	case TypeBallot:
		var w wireBallot
		if err := decoding.Unmarshal(raw, &w); err != nil {
			return nil, err
		}
		b := Ballot{Entries: entries(w.Entries), Expelled: peersOrNil(w.Expelled)}
		if c := w.Justified; c != nil {
			b.Justified = Checkpoint{Height: c.Height, ID: c.ID, Roster: c.Roster}
		}
		if w.Roster != nil {
			b.Roster = *w.Roster
		}
		return b, nil
	case TypeRecord:
		var w wireSigned
		if err := decoding.Unmarshal(raw, &w); err != nil {
			return nil, err
		}
		return SignedRecord{Counter: w.Counter, TimedOut: w.TimedOut, Record: w.Record.record(slot, parent)}, nil
	case TypeReturn:
		var w wireReturn
		if err := decoding.Unmarshal(raw, &w); err != nil {
			return nil, err
		}
		return Return{Counter: w.Counter, Head: w.Record.record(w.Slot, w.Parent)}, nil
	case TypeVote:
		var w wireContent
		if err := decoding.Unmarshal(raw, &w); err != nil {
			return nil, err
		}
		return Vote{Target: w.Record.record(w.Slot, w.Parent)}, nil
	case TypeProof:
		var w wireProof
		if err := decoding.Unmarshal(raw, &w); err != nil {
			return nil, err
		}
		return Proof{Peer: w.Peer, A: w.A, B: w.B}, nil
	case TypeRoster, TypePetition:
		var b []byte
		if err := decoding.Unmarshal(raw, &b); err != nil {
			return nil, err
		}
		if t == TypeRoster {
			return RosterNotice{Data: b}, nil
		}
		return Petition{Data: b}, nil
	case TypeContact:
		var a []string
		if err := decoding.Unmarshal(raw, &a); err != nil {
			return nil, err
		}
		return Contact{Addresses: a}, nil
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

func (s Stop) validate() error {
	if s > StopMoney {
		return fmt.Errorf("unknown reason to stop %d: the sender may run a newer version", uint8(s))
	}
	return nil
}

func (c Convergence) validate() error {
	if c.Count == 0 && c != (Convergence{}) || c.Count > 0 && c.Stale >= c.Count {
		return fmt.Errorf("%d validations without an improvement of %d", c.Stale, c.Count)
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
	return errors.Join(a.Stop.validate(), a.Validation.validate())
}

func validatePeers(set []Peer) error {
	for i, p := range set {
		if p >= MaxPeers || i > 0 && set[i-1] >= p {
			return fmt.Errorf("peer %s is out of order or range", p)
		}
	}
	return nil
}

func (b Ballot) validate(m *Message) error {
	if err := validatePeers(b.Expelled); err != nil {
		return fmt.Errorf("expelled: %w", err)
	}
	if c := b.Justified; c != (Checkpoint{}) && (c.Height == 0 || c.Height >= m.Slot) {
		return fmt.Errorf("a justified checkpoint of height %d in slot %d", c.Height, m.Slot)
	}
	return validateEntries(b.Entries)
}

func (v Vote) validate(m *Message) error {
	if m.Slot != v.Target.Height || m.Roster != v.Target.Roster || v.Target.ID() != m.Parent {
		return errors.New("its target is not the one that the message names")
	}
	return v.Target.validate()
}

func (p Proof) validate(m *Message) error {
	switch {
	case p.Peer >= MaxPeers:
		return fmt.Errorf("accuses peer %s", p.Peer)
	case len(p.A) > maxPlainBytes || len(p.B) > maxPlainBytes:
		return fmt.Errorf("messages of %d and %d bytes, more than %d", len(p.A), len(p.B), maxPlainBytes)
	}
	return nil
}

func (r RosterNotice) validate(*Message) error {
	if len(r.Data) == 0 || len(r.Data) > maxPlainBytes-1<<10 {
		return fmt.Errorf("a roster of %d bytes", len(r.Data))
	}
	return nil
}

func (c Contact) validate(*Message) error {
	if len(c.Addresses) > maxAddresses {
		return fmt.Errorf("%d addresses, more than %d", len(c.Addresses), maxAddresses)
	}
	for _, a := range c.Addresses {
		if a == "" || len(a) > maxAddressBytes {
			return fmt.Errorf("an address of %d bytes", len(a))
		}
	}
	return nil
}

func (p Petition) validate(*Message) error {
	if len(p.Data) == 0 || len(p.Data) > 16<<10 {
		return fmt.Errorf("a petition of %d bytes", len(p.Data))
	}
	return nil
}

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
	case r.Justified.Height >= r.Height:
		return fmt.Errorf("the justified checkpoint of height %d is not among the ancestors of height %d", r.Justified.Height, r.Height)
	case r.Position > MaxSlot:
		return fmt.Errorf("position %d out of range", r.Position)
	}
	if err := validatePeers(r.Expelled); err != nil {
		return fmt.Errorf("expelled: %w", err)
	}
	for _, e := range r.Set {
		if _, ok := slices.BinarySearch(r.Expelled, e.Peer); ok {
			return fmt.Errorf("peer %s is both in the set and expelled", e.Peer)
		}
	}
	if err := errors.Join(r.Validation.validate(), r.Convergence.validate(), r.Stop.validate()); err != nil {
		return err
	}
	return validateEntries(r.Set)
}

func (r Return) validate(m *Message) error {
	if r.Head.Slot >= m.Slot || r.Head.ID() != m.Parent {
		return errors.New("its head is not the parent")
	}
	if r.Counter > MaxSlot {
		return fmt.Errorf("counter %d out of range", r.Counter)
	}
	return r.Head.validate()
}

// validate checks what does not depend on the job.
func (m *Message) validate() error {
	if m.Slot == 0 || m.Slot > MaxSlot || m.Body == nil {
		return fmt.Errorf("slot %d out of range", m.Slot)
	}
	return m.Body.validate(m)
}

// encodeMessage returns the bytes that are signed, without the domain.
func encodeMessage(job Hash, m *Message) []byte {
	return mustEncode(wireMessage{
		Job: job, Roster: m.Roster, Type: m.Type(), From: m.From, Slot: m.Slot, Parent: m.Parent,
		Body: mustEncode(m.Body.wire()),
	})
}

func signedBytes(message []byte) []byte {
	return append(append(make([]byte, 0, len(messageDomain)+len(message)), messageDomain...), message...)
}

// Sign encodes and signs a message of this machine's own peer. The id names
// the message, whatever the signature's bits.
func Sign(key ed25519.PrivateKey, job Hash, m Message) (envelope []byte, id Hash, err error) {
	if err := m.validate(); err != nil {
		return nil, Hash{}, fmt.Errorf("signing a %s for slot %d: %w", m.Type(), m.Slot, err)
	}
	message := encodeMessage(job, &m)
	signed := signedBytes(message)
	envelope = mustEncode(wireEnvelope{Message: message, Signature: ed25519.Sign(key, signed)})
	if len(envelope) > MaxMessageBytes {
		return nil, Hash{}, fmt.Errorf("signing a %s for slot %d: %d bytes, more than %d", m.Type(), m.Slot, len(envelope), MaxMessageBytes)
	}
	return envelope, treehash.Sum(signed), nil
}

// ID names a message as Sign and Open do.
func ID(job Hash, m Message) Hash { return treehash.Sum(signedBytes(encodeMessage(job, &m))) }

// Measure names a message as ID does, and gives the bytes of the envelope that
// Sign would make of it.
func Measure(job Hash, m Message) (id Hash, bytes int) {
	message := encodeMessage(job, &m)
	return treehash.Sum(signedBytes(message)), len(mustEncode(wireEnvelope{Message: message, Signature: make([]byte, ed25519.SignatureSize)}))
}

// Keys are the public keys of rosters, by member index; nil where there is no
// member. It reports whether the roster is known, and may be called by several
// goroutines at once.
type Keys func(roster Hash) (members []ed25519.PublicKey, ok bool)

// Open decodes an envelope and checks everything that can be checked without
// the run's history: bounds, canonical form (one value has one encoding), job,
// membership and signature; of a proof also the two messages in it. The error
// wraps ErrUnknownRoster if keys does not know the roster. It is safe for
// concurrent use and keeps no part of the envelope.
func Open(envelope []byte, job Hash, keys Keys) (Message, Hash, error) {
	m, id, err := open(envelope, job, keys)
	if err != nil {
		return Message{}, Hash{}, fmt.Errorf("refused message: %w", err)
	}
	return m, id, nil
}

func open(envelope []byte, job Hash, keys Keys) (m Message, id Hash, err error) {
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
	if w.Job != job {
		return m, id, fmt.Errorf("it is of job %s, not %s", w.Job.Short(), job.Short())
	}
	if len(envelope) > maxPlainBytes && w.Type != TypeProof {
		return m, id, fmt.Errorf("a %s of %d bytes, more than %d", w.Type, len(envelope), maxPlainBytes)
	}
	members, ok := keys(w.Roster)
	if !ok {
		return m, id, fmt.Errorf("%s of peer %s, roster %s: %w", w.Type, w.From, w.Roster.Short(), ErrUnknownRoster)
	}
	if int(w.From) >= len(members) || members[w.From] == nil {
		return m, id, fmt.Errorf("peer %s is not on the roster %s", w.From, w.Roster.Short())
	}
	body, err := decodeBody(w.Type, w.Body, w.Slot, w.Parent)
	if err != nil {
		return m, id, fmt.Errorf("%s of peer %s: %w", w.Type, w.From, err)
	}
	m = Message{From: w.From, Slot: w.Slot, Parent: w.Parent, Roster: w.Roster, Body: body}
	if err := m.validateFor(members); err != nil {
		return m, id, fmt.Errorf("%s of peer %s: %w", w.Type, w.From, err)
	}
	if !bytes.Equal(encodeMessage(job, &m), e.Message) || !bytes.Equal(mustEncode(e), envelope) {
		return m, id, fmt.Errorf("%s of peer %s: not in canonical form", w.Type, w.From)
	}
	signed := signedBytes(e.Message)
	if !ed25519.Verify(members[w.From], signed, e.Signature) {
		return m, id, fmt.Errorf("%s of peer %s: the signature is not this peer's", w.Type, w.From)
	}
	if p, ok := body.(Proof); ok {
		if err := p.check(job, keys); err != nil {
			return m, id, fmt.Errorf("%s of peer %s: %w", w.Type, w.From, err)
		}
	}
	return m, treehash.Sum(signed), nil
}

// NewProof makes a proof of two envelopes, or says why they are none.
func NewProof(a, b []byte, job Hash, keys Keys) (Proof, error) {
	m, _, err := open(a, job, keys)
	if err != nil {
		return Proof{}, fmt.Errorf("no proof: %w", err)
	}
	p := Proof{Peer: m.From, A: bytes.Clone(a), B: bytes.Clone(b)}
	if bytes.Compare(p.A, p.B) > 0 {
		p.A, p.B = p.B, p.A
	}
	if err := p.check(job, keys); err != nil {
		return Proof{}, fmt.Errorf("no proof: %w", err)
	}
	return p, nil
}

func (p *Proof) check(job Hash, keys Keys) error {
	var m [2]Message
	var ids [2]Hash
	for i, b := range [][]byte{p.A, p.B} {
		var err error
		if m[i], ids[i], err = open(b, job, keys); err != nil {
			return fmt.Errorf("message %d: %w", i+1, err)
		}
		if m[i].From != p.Peer {
			return fmt.Errorf("message %d is of peer %s, not of %s", i+1, m[i].From, p.Peer)
		}
	}
	if bytes.Compare(p.A, p.B) > 0 || ids[0] == ids[1] || !conflicts(&m[0], &m[1]) {
		return errors.New("an honest peer may sign both messages")
	}
	return nil
}

// headVote returns the counter and the record of a vote for a head; zero if the
// message is none.
func (m *Message) headVote() (counter uint64, record Hash) {
	switch b := m.Body.(type) {
	case SignedRecord:
		return b.Counter, b.Record.ID()
	case Return:
		return b.Counter, m.Parent
	}
	return 0, Hash{}
}

// conflicts reports whether no honest peer signs both of two different
// messages.
func conflicts(a, b *Message) bool {
	if a.From != b.From {
		return false
	}
	if c, record := a.headVote(); c > 0 {
		if d, other := b.headVote(); c == d && record != other {
			return true
		}
	}
	if a.Type() != b.Type() {
		return false
	}
	switch x := a.Body.(type) {
	case Announce, Ballot:
		return a.Slot == b.Slot && a.Parent == b.Parent
	case SignedRecord:
		return a.Slot == b.Slot && a.Parent == b.Parent || x.Counter == b.Body.(SignedRecord).Counter
	case Vote:
		y := b.Body.(Vote)
		s, t := &x.Target, &y.Target
		if s.Height > t.Height {
			s, t = t, s
		}
		return s.Height == t.Height || t.Justified.Height < s.Justified.Height
	}
	return false
}

// validateFor checks a message against a roster. Sets are of gradients that
// were announced under the roster of the message, but for those of Return and
// Vote, which are older.
func (m *Message) validateFor(members []ed25519.PublicKey) error {
	if err := m.validate(); err != nil {
		return err
	}
	var set []Entry
	switch b := m.Body.(type) {
	case Ballot:
		set = b.Entries
	case SignedRecord:
		set = b.Record.Set
	}
	for _, e := range set {
		if int(e.Peer) >= len(members) || members[e.Peer] == nil {
			return fmt.Errorf("names peer %s, who is not on the roster", e.Peer)
		}
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
		s += ": " + describeSet(b.Entries)
		if len(b.Expelled) > 0 {
			s += fmt.Sprintf(" expels %d", b.Expelled)
		}
		if b.Justified != (Checkpoint{}) {
			s += fmt.Sprintf(" justified %s", b.Justified.ID.Short())
		}
		if b.Roster != (Hash{}) {
			s += fmt.Sprintf(" roster %s", b.Roster.Short())
		}
	case Vote:
		s += fmt.Sprintf(" from %s height %d", b.Target.Justified.ID.Short(), b.Target.Justified.Height)
	case Proof:
		s += fmt.Sprintf(": against %d", b.Peer)
	case Return:
		if b.Counter > 0 {
			s += fmt.Sprintf(": counter %d", b.Counter)
		}
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
