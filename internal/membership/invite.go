package membership

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/zeebo/blake3"
)

// Contact says where a peer may be reached.
type Contact struct {
	Key ed25519.PublicKey
	// Addresses are multiaddresses, or host:port, of that peer.
	Addresses []string
}

// Invite lets its holder ask to become a member: whoever has the string may.
type Invite struct {
	Job    Hash
	Expiry time.Time // in whole seconds
	// Uses is how many members it makes at most. Nonce tells invites apart
	// where the uses are counted.
	Uses  uint32
	Nonce [8]byte
	// Contacts are the peers to ask.
	Contacts []Contact
	// Admin is the position of the key in Genesis.Admins that signed it.
	Admin     uint8
	Signature [ed25519.SignatureSize]byte
}

const (
	invitePrefix   = "spirt1"
	inviteChecksum = 4
	maxInviteUses  = MaxIndices
)

type (
	wireContact struct {
		_         struct{} `cbor:",toarray"`
		Key       key
		Addresses []string
	}
	wireInvite struct {
		_        struct{} `cbor:",toarray"`
		Job      Hash
		Expiry   uint64
		Uses     uint32
		Nonce    [8]byte
		Contacts []wireContact
		Admin    uint8
	}
	wireSignedInvite struct {
		_         struct{} `cbor:",toarray"`
		Invite    wireInvite
		Signature [ed25519.SignatureSize]byte
	}
)

func wireContacts(contacts []Contact) []wireContact {
	out := make([]wireContact, 0, len(contacts))
	for _, c := range contacts {
		out = append(out, wireContact{Key: keyOf(c.Key), Addresses: list(c.Addresses)})
	}
	return out
}

func contacts(wire []wireContact, limit int) ([]Contact, error) {
	if len(wire) > limit {
		return nil, fmt.Errorf("%d peers with addresses, more than %d", len(wire), limit)
	}
	var out []Contact
	for _, c := range wire {
		if err := checkAddresses(c.Addresses); err != nil {
			return nil, err
		}
		out = append(out, Contact{Key: c.Key.public(), Addresses: c.Addresses})
	}
	return out, nil
}

func (i *Invite) wire() *wireInvite {
	return &wireInvite{
		Job: i.Job, Expiry: uint64(i.Expiry.Unix()), Uses: i.Uses, Nonce: i.Nonce,
		Contacts: wireContacts(i.Contacts), Admin: i.Admin,
	}
}

func (i *Invite) content() []byte { return domain(inviteDomain, mustEncode(i.wire())) }

func (i *Invite) encode() []byte {
	return mustEncode(&wireSignedInvite{Invite: *i.wire(), Signature: i.Signature})
}

// Sign signs an invite by an admin. Contacts that do not fit in MaxInvite bytes
// of string are left out, last ones first.
func (i *Invite) Sign(g *Genesis, admin ed25519.PrivateKey) error {
	at, err := g.Admin(admin.Public().(ed25519.PublicKey))
	if err != nil {
		return err
	}
	i.Job, i.Admin = g.ID(), uint8(at)
	for len(i.Contacts) > 0 && len(i.String()) > MaxInvite {
		if last := &i.Contacts[len(i.Contacts)-1]; len(last.Addresses) > 1 {
			last.Addresses = last.Addresses[:len(last.Addresses)-1]
		} else {
			i.Contacts = i.Contacts[:len(i.Contacts)-1]
		}
	}
	if err := i.validate(); err != nil {
		return fmt.Errorf("invite: %w", err)
	}
	copy(i.Signature[:], ed25519.Sign(admin, i.content()))
	return nil
}

func (i *Invite) validate() error {
	switch {
	case i.Uses < 1 || i.Uses > maxInviteUses:
		return fmt.Errorf("it makes %d members: 1 to %d are possible", i.Uses, maxInviteUses)
	case i.Expiry.Unix() < 0 || i.Expiry.Unix() > 1<<40:
		return errors.New("its date of expiry is out of range")
	case len(i.Contacts) == 0:
		return errors.New("it names no peer with an address to ask: run the peer on an address that others reach, with --listen")
	}
	for _, c := range i.Contacts {
		if len(c.Addresses) == 0 {
			return errors.New("it names a peer without an address")
		}
	}
	return nil
}

// Verify checks an invite against the job, and that it is still good.
func (i *Invite) Verify(g *Genesis, now time.Time) error {
	job := g.ID()
	switch {
	case i.Job != job:
		return fmt.Errorf("the invite is for job %s, not %s", i.Job.Short(), job.Short())
	case int(i.Admin) >= len(g.Admins) || !ed25519.Verify(g.Admins[i.Admin], i.content(), i.Signature[:]):
		return errors.New("the invite is not signed by an admin of the job")
	}
	return i.Fresh(now)
}

// Fresh returns an error if the invite has expired.
func (i *Invite) Fresh(now time.Time) error {
	if now.After(i.Expiry) {
		return fmt.Errorf("the invite expired on %s: ask for a new one", i.Expiry.UTC().Format("2 January 2006 at 15:04 UTC"))
	}
	return nil
}

// String returns the invite as one word: letters, digits, - and _.
func (i *Invite) String() string {
	b := i.encode()
	sum := blake3.Sum256(b)
	return invitePrefix + base64.RawURLEncoding.EncodeToString(append(b, sum[:inviteChecksum]...))
}

// ParseInvite reads what String wrote, perhaps with spaces around it. Who signed
// it can be checked when the job's genesis is here.
func ParseInvite(s string) (*Invite, error) {
	i, err := parseInvite(strings.TrimSpace(s))
	if err != nil {
		return nil, fmt.Errorf("invite: %w", err)
	}
	return i, nil
}

func parseInvite(s string) (*Invite, error) {
	text, ok := strings.CutPrefix(s, invitePrefix)
	if !ok {
		return nil, fmt.Errorf("%.20q does not begin with %q: paste the whole string that `spirt invite` printed", s, invitePrefix)
	}
	if len(s) > MaxInvite {
		return nil, fmt.Errorf("%d characters, more than %d", len(s), MaxInvite)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	damaged := errors.New("it is damaged, a part is missing or was changed: paste the whole string that `spirt invite` printed")
	if err != nil || len(b) < inviteChecksum {
		return nil, damaged
	}
	b, check := b[:len(b)-inviteChecksum], b[len(b)-inviteChecksum:]
	if sum := blake3.Sum256(b); !bytes.Equal(sum[:inviteChecksum], check) {
		return nil, damaged
	}
	return DecodeInvite(b)
}

// DecodeInvite reads the binary form of an invite, as petitions hold it.
func DecodeInvite(b []byte) (*Invite, error) {
	var w wireSignedInvite
	if err := decode(b, MaxInvite, &w); err != nil {
		return nil, err
	}
	v := &w.Invite
	peers, err := contacts(v.Contacts, maxAddresses)
	if err != nil {
		return nil, err
	}
	if v.Expiry > 1<<40 {
		return nil, errors.New("its date of expiry is out of range")
	}
	i := &Invite{
		Job: v.Job, Expiry: time.Unix(int64(v.Expiry), 0), Uses: v.Uses, Nonce: v.Nonce,
		Contacts: peers, Admin: v.Admin, Signature: w.Signature,
	}
	return i, i.validate()
}
