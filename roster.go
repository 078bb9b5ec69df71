package spirt

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/p2p"
)

// roster is the file that names the peers of a run, in the order in which
// averages are summed.
type roster struct {
	Members []string `yaml:"members"` // libp2p peer IDs
}

// identities is who takes part in which job.
type identities struct {
	key     ed25519.PrivateKey // this peer's own
	members []ed25519.PublicKey
	job     treehash.Hash // names the job: the same at every peer of it
	roster  treehash.Hash // names the roster of the job
}

// createIdentities makes a key for each peer of a new run and the roster.
func createIdentities(dir string, peers int) error {
	var r roster
	for n := 1; n <= peers; n++ {
		if err := os.MkdirAll(peerDir(dir, n), 0o755); err != nil {
			return err
		}
		key, err := p2p.NewKey()
		if err != nil {
			return fmt.Errorf("making the key of peer %d: %w", n, err)
		}
		if err := p2p.WriteKey(filepath.Join(peerDir(dir, n), keyFile), key); err != nil {
			return err
		}
		id, err := p2p.ID(key.Public().(ed25519.PublicKey))
		if err != nil {
			return err
		}
		r.Members = append(r.Members, string(id))
	}
	return writeYAML(filepath.Join(dir, rosterFile), "The peers of this run, in the order in which averages are summed.", r)
}

// loadIdentities reads the roster of a run and the key of peer n, and checks
// that they belong together.
func loadIdentities(dir string, n int, job Job, spec nn.Spec) (identities, error) {
	path := filepath.Join(dir, rosterFile)
	b, err := readFile(path, maxJobFile)
	if err != nil {
		return identities{}, err
	}
	var ids identities
	if ids.members, err = parseRoster(b); err != nil {
		return identities{}, fmt.Errorf("roster %s: %w", path, err)
	}
	if len(ids.members) != job.Peers {
		return identities{}, fmt.Errorf("roster %s has %d members, the job has %d peers", path, len(ids.members), job.Peers)
	}
	if err := checkPeer(n, job.Peers); err != nil {
		return identities{}, err
	}
	if ids.key, err = p2p.LoadKey(filepath.Join(peerDir(dir, n), keyFile)); err != nil {
		return identities{}, err
	}
	if !ids.members[n-1].Equal(ids.key.Public()) {
		return identities{}, fmt.Errorf("the key of peer %d is not the one in %s: it would be refused by the others", n, path)
	}
	ids.job, ids.roster, err = nameJob(job, spec, ids.members)
	return ids, err
}

// parseRoster reads the text of a roster file.
func parseRoster(b []byte) ([]ed25519.PublicKey, error) {
	var r roster
	if err := yaml.UnmarshalWithOptions(b, &r, yaml.Strict()); err != nil {
		return nil, errors.New(strings.TrimSpace(yaml.FormatError(err, false, true)))
	}
	if len(r.Members) > maxPeers {
		return nil, fmt.Errorf("%d members are too many: at most %d", len(r.Members), maxPeers)
	}
	keys := make([]ed25519.PublicKey, len(r.Members))
	for i, m := range r.Members {
		key, err := p2p.PeerID(m).PublicKey()
		if err != nil {
			return nil, fmt.Errorf("member %d: %w", i+1, err)
		}
		keys[i] = key
	}
	return keys, nil
}

// arithmeticVersion changes with everything that changes a model's bits.
const arithmeticVersion = 2

// nameJob returns the names of a job (its genesis) and of its roster: tree
// hashes of a domain and what is agreed on.
func nameJob(job Job, spec nn.Spec, members []ed25519.PublicKey) (jobID, rosterID treehash.Hash, err error) {
	// Field order is fixed by the types, so that the JSON is the same everywhere.
	genesis, err := json.Marshal(struct {
		Arithmetic int
		Job        Job
		Spec       nn.Spec
	}{arithmeticVersion, job, spec})
	if err != nil {
		return jobID, rosterID, fmt.Errorf("encoding the genesis: %w", err)
	}
	jobID = treehash.Sum(append([]byte("spirt/1 genesis\x00"), genesis...))
	b := append([]byte("spirt/1 roster\x00"), jobID[:]...)
	for _, m := range members {
		b = append(b, m...)
	}
	return jobID, treehash.Sum(b), nil
}

// peerAddresses returns the host:port of each peer: consecutive ports from
// first, or free ports of loopback where first is empty.
func peerAddresses(first string, peers int) ([]string, error) {
	out := make([]string, peers)
	if first == "" {
		for i := range out {
			out[i] = "127.0.0.1:0"
		}
		return out, nil
	}
	host, port, err := net.SplitHostPort(first)
	if err != nil {
		return nil, fmt.Errorf("listen address %q: %w: take host:port, such as 127.0.0.1:7000", first, err)
	}
	p, err := strconv.Atoi(port)
	if err != nil || p < 0 || p+peers-1 > 65535 {
		return nil, fmt.Errorf("listen address %q: the ports of %d peers do not fit in 0 to 65535", first, peers)
	}
	for i := range out {
		q := p
		if p != 0 {
			q += i
		}
		out[i] = net.JoinHostPort(host, strconv.Itoa(q))
	}
	return out, nil
}
