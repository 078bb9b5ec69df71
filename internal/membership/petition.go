package membership

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"unicode/utf8"
)

// Kind says what a petition asks for; its values are on the wire.
type Kind uint8

// What may be asked of those who hold an admin key.
const (
	// Join asks for membership, with an invite.
	Join Kind = 1
	// Leave asks to be taken off the roster.
	Leave Kind = 2
	// Rekey asks to replace the member's key.
	Rekey Kind = 3
	// Follow asks for genesis, rosters and addresses only; with an invite, or
	// of a member.
	Follow Kind = 4
)

func (k Kind) String() string {
	names := [...]string{"", "join", "leave", "new key", "follow"}
	if k > 0 && int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("petition of kind %d", uint8(k))
}

// Petition is what a peer asks of those who hold an admin key. Any member may
// pass it on: it is signed by whom it concerns.
type Petition struct {
	Job  Hash
	Kind Kind
	// Key is the newcomer's, the leaving member's, or the new one.
	Key ed25519.PublicKey
	// Old is the member's present key; of a Rekey only.
	Old ed25519.PublicKey
	// Invite allows to join, and to follow those who are no members. Name,
	// Private and Minibatches are what the newcomer would like to be on the
	// roster as; of a Join only. From is the first epoch whose roster it lacks.
	Invite      *Invite
	Name        string
	Private     bool
	Minibatches uint16
	From        uint64

	signature, oldSignature [ed25519.SignatureSize]byte
}

type (
	wirePetition struct {
		_           struct{} `cbor:",toarray"`
		Job         Hash
		Kind        Kind
		Key         key
		Old         []byte
		Invite      []byte
		Name        string
		Private     bool
		Minibatches uint16
		From        uint64
	}
	wireSignedPetition struct {
		_            struct{} `cbor:",toarray"`
		Petition     wirePetition
		Signature    [ed25519.SignatureSize]byte
		OldSignature []byte
	}
)

func (p *Petition) wire() *wirePetition {
	w := &wirePetition{
		Job: p.Job, Kind: p.Kind, Key: keyOf(p.Key), Old: list([]byte(p.Old)), Invite: []byte{}, Name: p.Name,
		Private: p.Private, Minibatches: p.Minibatches, From: p.From,
	}
	if p.Invite != nil {
		w.Invite = p.Invite.encode()
	}
	return w
}

// Sign fills in the keys, signs the petition and returns its encoding. old is
// the member's present key where the petition asks for another, else nil.
func (p *Petition) Sign(private, old ed25519.PrivateKey) ([]byte, error) {
	p.Key, p.Old = private.Public().(ed25519.PublicKey), nil
	if old != nil {
		p.Old = old.Public().(ed25519.PublicKey)
	}
	if err := p.validate(); err != nil {
		return nil, fmt.Errorf("petition: %w", err)
	}
	content := domain(petitionDomain, mustEncode(p.wire()))
	copy(p.signature[:], ed25519.Sign(private, content))
	w := wireSignedPetition{Petition: *p.wire(), Signature: p.signature, OldSignature: []byte{}}
	if old != nil {
		copy(p.oldSignature[:], ed25519.Sign(old, content))
		w.OldSignature = p.oldSignature[:]
	}
	return mustEncode(&w), nil
}

func (p *Petition) validate() error {
	switch {
	case p.Kind < Join || p.Kind > Follow:
		return fmt.Errorf("unknown kind %d: the sender may run a newer version", uint8(p.Kind))
	case p.Kind == Join && p.Invite == nil, p.Kind != Join && p.Kind != Follow && p.Invite != nil:
		return errors.New("an invite belongs to those who want to join, and to nobody else")
	case (p.Kind == Rekey) != (p.Old != nil):
		return errors.New("an old key belongs to those who want a new one, and to nobody else")
	case p.Invite != nil && p.Invite.Job != p.Job:
		return errors.New("its invite is for another job")
	case p.Kind != Join && (p.Name != "" || p.Private || p.Minibatches != 0):
		return errors.New("it says more than what it asks for")
	}
	return CheckName(p.Name)
}

// DecodePetition reads what Sign returned and checks the signatures in it. It
// does not check the invite, nor who is a member.
func DecodePetition(b []byte) (*Petition, error) {
	p, err := decodePetition(b)
	if err != nil {
		return nil, fmt.Errorf("petition: %w", err)
	}
	return p, nil
}

func decodePetition(b []byte) (*Petition, error) {
	var w wireSignedPetition
	if err := decode(b, MaxPetitionBytes, &w); err != nil {
		return nil, err
	}
	v := &w.Petition
	p := &Petition{
		Job: v.Job, Kind: v.Kind, Key: v.Key.public(), Name: v.Name, Private: v.Private,
		Minibatches: v.Minibatches, From: v.From, signature: w.Signature,
	}
	if len(v.Invite) > 0 {
		var err error
		if p.Invite, err = DecodeInvite(v.Invite); err != nil {
			return nil, fmt.Errorf("its invite: %w", err)
		}
	}
	switch {
	case len(v.Old) == ed25519.PublicKeySize:
		p.Old = v.Old
	case len(v.Old) > 0:
		return nil, fmt.Errorf("an old key of %d bytes", len(v.Old))
	}
	if len(w.OldSignature) != 0 && len(w.OldSignature) != ed25519.SignatureSize || (len(w.OldSignature) == 0) != (p.Old == nil) {
		return nil, fmt.Errorf("a signature by the old key of %d bytes", len(w.OldSignature))
	}
	copy(p.oldSignature[:], w.OldSignature)
	if err := p.validate(); err != nil {
		return nil, err
	}
	content := domain(petitionDomain, mustEncode(v))
	if !ed25519.Verify(p.Key, content, p.signature[:]) || p.Old != nil && !ed25519.Verify(p.Old, content, p.oldSignature[:]) {
		return nil, errors.New("its signature is not by the key that it names")
	}
	return p, nil
}

// Answer is what a newcomer gets.
type Answer struct {
	// Refused says why it does not become a member; empty if it is not
	// refused.
	Refused string
	// Pending says that a peer with an admin key must decide, and that the
	// newcomer asks again in a while.
	Pending bool
	// Genesis is the encoding of the job's.
	Genesis []byte
	// Rosters are encodings of rosters, in the order in which a chain takes
	// them, from the epoch that was asked for. More says that there are later
	// ones.
	Rosters [][]byte
	More    bool
	// Contacts are where members may be reached.
	Contacts []Contact
}

type wireAnswer struct {
	_        struct{} `cbor:",toarray"`
	Refused  string
	Pending  bool
	Genesis  []byte
	Rosters  [][]byte
	More     bool
	Contacts []wireContact
}

// Encode returns the one encoding of an answer. It cuts a long reason short,
// and leaves out the last rosters, with More set, where all do not fit.
func (a Answer) Encode() []byte {
	if len(a.Refused) > maxReason {
		a.Refused = a.Refused[:maxReason]
		for !utf8.ValidString(a.Refused) && a.Refused != "" {
			a.Refused = a.Refused[:len(a.Refused)-1]
		}
	}
	const reserve = 1 << 20 // for all but the rosters
	size := 0
	for i, r := range a.Rosters {
		if size += len(r); size > MaxAnswerBytes-reserve {
			a.Rosters, a.More = a.Rosters[:i], true
			break
		}
	}
	w := wireAnswer{Refused: a.Refused, Pending: a.Pending, Genesis: list(a.Genesis), Rosters: [][]byte{}, More: a.More}
	for _, r := range a.Rosters {
		w.Rosters = append(w.Rosters, list(r))
	}
	size = 0
	for i, c := range a.Contacts {
		for _, s := range c.Addresses {
			size += len(s) + 8
		}
		if size += ed25519.PublicKeySize + 8; size > reserve-MaxGenesisBytes-2*maxReason {
			a.Contacts = a.Contacts[:i]
			break
		}
	}
	w.Contacts = wireContacts(a.Contacts)
	return mustEncode(&w)
}

// DecodeAnswer reads what Encode wrote. What it holds is not verified: see
// DecodeGenesis and Chain.
func DecodeAnswer(b []byte) (*Answer, error) {
	var w wireAnswer
	if err := decode(b, MaxAnswerBytes, &w); err != nil {
		return nil, fmt.Errorf("answer: %w", err)
	}
	peers, err := contacts(w.Contacts, maxContacts)
	if err != nil {
		return nil, fmt.Errorf("answer: %w", err)
	}
	if len(w.Refused) > maxReason || !printable(w.Refused) {
		return nil, errors.New("answer: its reason is no text that could be shown")
	}
	return &Answer{Refused: w.Refused, Pending: w.Pending, Genesis: w.Genesis, Rosters: w.Rosters, More: w.More, Contacts: peers}, nil
}
