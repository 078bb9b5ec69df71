package spirt

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/p2p"
)

// admin signs rosters with the admin key of a run folder. Several processes
// may: they take turns by a lock.
type admin struct {
	run     string
	job     Job
	rosters *rosters
	key     ed25519.PrivateKey
}

// openAdmin returns nil where the folder has no admin key.
func openAdmin(run string, job Job, rosters *rosters) (*admin, error) {
	key, err := p2p.LoadKey(filepath.Join(run, adminFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if _, err := rosters.genesis.Admin(key.Public().(ed25519.PublicKey)); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(run, adminFile), err)
	}
	return &admin{run: run, job: job, rosters: rosters, key: key}, nil
}

// errNoAdmin tells what only a holder of the admin key may do.
func errNoAdmin(run string) error {
	return fmt.Errorf("%s has no %s: only the machine that made the job can do this, or one that you copied that file to", run, adminFile)
}

// change signs the roster that change makes of the latest. Change reports
// whether there is anything to sign.
func (a *admin) change(change func(r *membership.Roster) (bool, error)) error {
	release, err := lockWait(filepath.Join(a.run, adminFile+".lock"))
	if err != nil {
		return err
	}
	defer release()
	if _, err := a.rosters.rescan(); err != nil {
		return err
	}
	latest, _ := a.rosters.latest()
	next := a.rosters.genesis.First()
	if latest != nil {
		next = latest.Successor()
	}
	if ok, err := change(next); !ok || err != nil {
		return err
	}
	next.F = uint16(min(a.job.Byzantine, membership.MaxFaulty(len(next.Members))))
	if err := next.Sign(a.rosters.genesis, a.key); err != nil {
		return err
	}
	_, err = a.rosters.add(next)
	return err
}

// lockWait locks a file, when whoever holds it is done: that takes
// milliseconds.
func lockWait(path string) (release func() error, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		got, err := lockFile(f)
		switch {
		case err == nil && got:
			return f.Close, nil
		case err == nil && time.Now().After(end):
			err = errors.New("another process holds it")
		case err == nil:
			continue
		}
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
}

// grant does what a petition asks for, or says why not. It may be asked again
// for what was done.
func (a *admin) grant(p *membership.Petition, now time.Time) error {
	if p.Job != a.rosters.job {
		return fmt.Errorf("it is for job %s, not %s", p.Job.Short(), a.rosters.job.Short())
	}
	switch p.Kind {
	case membership.Join:
		return a.admit(p, now)
	case membership.Leave:
		return a.change(func(r *membership.Roster) (bool, error) {
			m, ok := r.Find(p.Key)
			if ok && len(r.Members) == 1 {
				return false, errors.New("it is the last member")
			}
			return ok && r.Remove(m.Index), nil
		})
	case membership.Rekey:
		return a.change(func(r *membership.Roster) (bool, error) {
			if _, ok := r.Find(p.Key); ok {
				return false, nil // done before
			}
			m, ok := r.Find(p.Old)
			if !ok {
				return false, errors.New("its present key is no member's")
			}
			i := slices.IndexFunc(r.Members, func(x membership.Member) bool { return x.Index == m.Index })
			r.Members[i].Key = p.Key
			return true, nil
		})
	}
	return nil
}

func (a *admin) admit(p *membership.Petition, now time.Time) error {
	return a.change(func(r *membership.Roster) (bool, error) {
		if _, ok := r.Find(p.Key); ok {
			return false, nil
		}
		if err := p.Invite.Verify(a.rosters.genesis, now); err != nil {
			return false, err
		}
		if a.rosters.was(p.Key) {
			return false, errors.New("this identity has left the job or was expelled: join with another folder")
		}
		if len(r.Members) >= maxPeers {
			return false, fmt.Errorf("the job is full: %d members", len(r.Members))
		}
		for _, m := range r.Members {
			if p.Name != "" && m.Name == p.Name {
				return false, fmt.Errorf("the name %q is taken: choose another with --name", p.Name)
			}
		}
		if err := a.use(p.Invite, p.Key); err != nil {
			return false, err
		}
		m := membership.Member{Key: p.Key, Name: p.Name, Private: p.Private}
		if p.Minibatches != 0 { // bounded: what it says of itself is not believed
			m.Minibatches = uint16(min(int(p.Minibatches), maxShare*a.job.BatchesPerRound))
		}
		r.Add(m)
		if _, start := a.rosters.latest(); start == nil && len(r.Members) >= a.job.Peers {
			r.Start = true
		}
		return true, nil
	})
}

// maxShare bounds a member's share of the work, in shares of the job's
// ordinary member.
const maxShare = 4

// was reports whether a key was a member's.
func (r *rosters) was(key ed25519.PublicKey) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.chain.Was(key)
}

// use counts an invite as used by a key, on disk before the roster is signed.
// The admin lock is held.
func (a *admin) use(i *membership.Invite, key ed25519.PublicKey) error {
	path := filepath.Join(a.run, invitesFile)
	used := map[string][]string{}
	if b, err := readFile(path, maxJobFile); err == nil {
		if err := json.Unmarshal(b, &used); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	nonce, who := hex.EncodeToString(i.Nonce[:]), hex.EncodeToString(key)
	if slices.Contains(used[nonce], who) {
		return nil
	}
	if len(used[nonce]) >= int(i.Uses) {
		return fmt.Errorf("the invite was used %d times, as often as it may: ask for a new one", len(used[nonce]))
	}
	used[nonce] = append(used[nonce], who)
	b, err := json.MarshalIndent(used, "", "  ")
	if err != nil {
		return err
	}
	return writeFileAtomic(path, append(b, '\n'), 0o600)
}

// petitions answers those who ask to join, leave or change their key, for a
// peer or for whoever passes them on.
type petitions struct {
	rosters *rosters
	admin   *admin // nil: others decide
	// relay passes a petition on to those who hold an admin key.
	relay func(petition []byte)
	// contacts returns where members may be reached.
	contacts func() []membership.Contact
	now      func() time.Time
}

// answer answers a petition of a peer with this identity.
func (s *petitions) answer(remote p2p.PeerID, petition []byte) (membership.Answer, error) {
	p, err := membership.DecodePetition(petition)
	if err != nil {
		return membership.Answer{}, err
	}
	by := p.Key
	if p.Kind == membership.Rekey {
		by = p.Old
	}
	if id, err := p2p.ID(by); err != nil || id != remote {
		return membership.Answer{}, errors.New("the petition is another peer's")
	}
	if p.Job != s.rosters.job {
		return membership.Answer{}, errors.New("the petition is for another job")
	}
	latest, _ := s.rosters.latest()
	_, member := latest.Find(by)
	if !member && p.Kind != membership.Leave && p.Kind != membership.Rekey {
		if p.Invite == nil {
			return membership.Answer{}, errors.New("this identity is no member of the job")
		}
		if err := p.Invite.Verify(s.rosters.genesis, s.now()); err != nil {
			return membership.Answer{Refused: err.Error()}, nil
		}
	}
	a := membership.Answer{Genesis: s.rosters.genesis.Encode()}
	done := member && p.Kind == membership.Join || p.Kind == membership.Follow || !member && p.Kind == membership.Leave
	if !done {
		if s.admin == nil {
			s.relay(petition)
			a.Pending = true
		} else if err := s.admin.grant(p, s.now()); err != nil {
			return membership.Answer{Refused: err.Error()}, nil
		}
	}
	for _, r := range s.rosters.all() {
		if r.Epoch >= p.From {
			a.Rosters = append(a.Rosters, r.Encode())
		}
	}
	a.Contacts = s.contacts()
	return a, nil
}

// NewInvite returns an invite to the job in a run folder, which makes so many
// members until it expires.
func NewInvite(run string, uses int, valid time.Duration) (string, error) {
	job, rosters, err := loadJob(run)
	if err != nil {
		return "", err
	}
	a, err := openAdmin(run, job, rosters)
	if err != nil {
		return "", err
	}
	if a == nil {
		return "", errNoAdmin(run)
	}
	if uses < 1 || uses > maxPeers {
		return "", &UsageError{fmt.Errorf("--uses %d: take 1 to %d", uses, maxPeers)}
	}
	if valid <= 0 || valid > 366*24*time.Hour {
		return "", &UsageError{fmt.Errorf("--expires %v: take up to a year, such as 24h", valid)}
	}
	i := &membership.Invite{Expiry: time.Now().Add(valid).Truncate(time.Second), Uses: uint32(uses), Contacts: contactsOf(run, rosters)}
	for c := range i.Contacts {
		i.Contacts[c].Addresses = short(i.Contacts[c].Addresses)
	}
	rand.Read(i.Nonce[:]) // never fails
	if err := i.Sign(rosters.genesis, a.key); err != nil {
		return "", err
	}
	return i.String(), nil
}

// contactsOf returns where members may be reached as far as a run folder
// tells: its own peers first.
func contactsOf(run string, rosters *rosters) (out []membership.Contact) {
	latest, _ := rosters.latest()
	if latest == nil {
		return nil
	}
	book := addressBook{}
	for _, own := range ownPeers(run, latest) {
		dir := peerDir(run, int(own.Index)+1)
		s, err := readSettings(dir)
		if err != nil || s.Listen == "" {
			if b, err := readFile(filepath.Join(dir, addressFile), 64<<10); err == nil {
				out = append(out, membership.Contact{Key: own.Key, Addresses: slices.DeleteFunc(strings.Fields(string(b)), func(a string) bool { return len(a) > 200 })})
			}
		} else if at, err := s.reachable(); err == nil && len(at) > 0 {
			out = append(out, membership.Contact{Key: own.Key, Addresses: at})
		}
		for id, at := range readAddressBook(dir) {
			book[id] = at
		}
	}
	for _, m := range latest.Members {
		id, err := p2p.ID(m.Key)
		if at := book[id]; err == nil && len(at) > 0 && !slices.ContainsFunc(out, func(c membership.Contact) bool { return c.Key.Equal(m.Key) }) {
			out = append(out, membership.Contact{Key: m.Key, Addresses: at})
		}
	}
	return slices.DeleteFunc(out, func(c membership.Contact) bool { return len(c.Addresses) == 0 })
}

// ownPeers returns the members whose folders are in this run folder.
func ownPeers(run string, r *membership.Roster) (own []membership.Member) {
	for _, m := range r.Members {
		if _, err := os.Stat(filepath.Join(peerDir(run, int(m.Index)+1), keyFile)); err == nil {
			own = append(own, m)
		}
	}
	return own
}
