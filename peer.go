package spirt

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"github.com/spirt-ml/spirt/events"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/function"
	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/p2p"
	"github.com/spirt-ml/spirt/tensordb"
)

// PeerConfig says which peer of which run to run.
type PeerConfig struct {
	// Run is the run folder, Peer the number of the peer from 1.
	Run  string
	Peer int
	// Listen is the host:port to listen on. Default: that of the peer's
	// settings, else 127.0.0.1:0.
	Listen string
	// Data is a data set of the peer's own ("idx:FOLDER") for its training
	// minibatches, of the job's image shape and classes. The roster must say
	// that the peer brings one. Default: that of the peer's settings, else the
	// job's.
	Data string
	// Database is the URL of a database in another process: redis://, rediss://
	// or unix://. Default: that of the peer's settings, else one in this
	// process.
	Database string
	// Executable runs this program again as a function instance. Default:
	// this process's own.
	Executable string
	// Logger takes what is of interest to someone who looks for a fault.
	// Default: none.
	Logger *slog.Logger

	step func(entry) // for tests: called after each step is in the journal
}

// RunPeer runs one peer until the job is finished or ctx is cancelled, which
// it reports as ErrInterrupted.
func RunPeer(ctx context.Context, cfg PeerConfig) error {
	for {
		p, err := openPeer(cfg)
		if err != nil {
			return err
		}
		err = p.run(ctx)
		replaced := errors.Is(err, errNewKey)
		if err = errors.Join(err, p.close()); !replaced {
			return err
		}
	}
}

// peer hosts a round.Machine: it feeds it events and does what it asks for,
// with this peer's database, functions and connections. The fields below mu
// are shared with its goroutines; the rest belongs to the one that runs loop.
type peer struct {
	cfg      PeerConfig
	n        int // number, from 1
	dir      string
	job      Job
	ids      identities
	model    *nn.Model
	data     *dataset.Dataset
	own      *dataset.Dataset // what this peer trains on, nil where it is the job's
	log      *slog.Logger
	events   *events.Log
	db       database
	server   *tensordb.Server
	store    *store
	platform *function.Platform
	computer *computer
	meter    *meter
	host     *p2p.Host
	cleanup  []func() error // in reverse order
	loop     loop
	vote     voteFile // of before the start

	petitions petitions
	relayed   chan []byte         // petitions of strangers, to be passed on
	announce  []string            // addresses that are not this machine's own
	reachable []string            // where others may reach this peer
	told      map[round.Hash]bool // rosters that the others were told of

	mu      sync.Mutex
	book    addressBook
	outputs map[string]bool            // of crashed functions, as told
	partial *partial                   // state that is being fetched
	opened  map[[32]byte]round.Message // by check, until the loop has them
}

// openPeer builds a peer from the bottom up: identity, database, functions,
// connections, and the machine that ties them together.
func openPeer(cfg PeerConfig) (_ *peer, err error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Executable == "" {
		cfg.Executable = function.Self()
	}
	p := &peer{
		cfg: cfg, n: cfg.Peer, dir: peerDir(cfg.Run, cfg.Peer), log: cfg.Logger,
		opened: map[[32]byte]round.Message{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	var rosters *rosters
	if p.job, rosters, err = loadJob(cfg.Run); err != nil {
		return nil, err
	}
	if p.ids, err = loadIdentities(cfg.Run, p.n, rosters); err != nil {
		return nil, err
	}
	unlock, err := lockPeer(p.dir, p.n)
	if err != nil {
		return nil, err
	}
	p.onClose(unlock) // last of all
	if p.model, p.data, err = p.job.open(); err != nil {
		return nil, err
	}
	s, err := readSettings(p.dir)
	if err != nil {
		return nil, err
	}
	orString(&p.cfg.Listen, s.Listen)
	orString(&p.cfg.Listen, "127.0.0.1:0")
	orString(&p.cfg.Data, s.Data)
	orString(&p.cfg.Database, s.Database)
	p.announce = s.Announce
	if cfg = p.cfg; cfg.Data != "" {
		if p.own, err = p.job.openOwn(absoluteData(cfg.Data), p.model.Spec()); err != nil {
			return nil, err
		}
	}
	if p.events, err = events.OpenLog(filepath.Join(cfg.Run, eventsFile)); err != nil {
		return nil, err
	}
	p.onClose(p.events.Close)
	prices, err := PricesOf(cfg.Run)
	if err != nil {
		return nil, err
	}
	p.meter = &meter{emit: p.emit, prices: prices, database: p.cfg.Database != ""}
	socket, err := p.openDatabase()
	if err != nil {
		return nil, err
	}
	if err := p.openFunctions(socket); err != nil {
		return nil, err
	}
	if p.ids.roster != (round.Hash{}) {
		if err := p.openLoop(); err != nil {
			return nil, err
		}
	}
	if err := p.openHost(); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *peer) onClose(f func() error) { p.cleanup = append(p.cleanup, f) }

// close undoes openPeer, last things first.
func (p *peer) close() error {
	var errs []error
	for i := len(p.cleanup) - 1; i >= 0; i-- {
		errs = append(errs, p.cleanup[i]())
	}
	p.cleanup = nil
	return errors.Join(errs...)
}

// openDatabase opens the tensor database, serves it to this peer's functions
// and puts the peer's samples in it. It returns the socket that functions use.
func (p *peer) openDatabase() (socket string, err error) {
	prefix := fmt.Sprintf("{%s:%d}:", p.ids.job.Short(), p.n)
	p.computer = &computer{job: p.job, self: p.n - 1, warn: p.warn}
	var db *tensordb.DB // in this process
	if p.cfg.Database != "" {
		err = p.openRemote(p.cfg.Database, prefix)
	} else if db, err = tensordb.Open(tensordb.Config{Dir: filepath.Join(p.dir, databaseDir), MaxMemory: p.databaseMemory(), Logger: p.log}); err == nil {
		p.db = db
		p.onClose(db.Close)
	}
	if err != nil {
		return "", err
	}
	p.store = newStore(p.db, prefix, &p.job, p.model.NumParams())
	p.computer.store = p.store
	if err := p.computer.loadSamples(p.data, p.own); err != nil || db == nil {
		return "", err
	}

	socket, err = p.socketPath()
	if err != nil {
		return "", err
	}
	listener, err := tensordb.ListenUnix(socket)
	if err != nil {
		return "", err
	}
	p.server = tensordb.NewServer(db, tensordb.ServerConfig{Logger: p.log, Version: Version()})
	p.computer.sign = p.server.Sign
	p.computer.base.Database.Network, p.computer.base.Database.Address = "unix", socket
	serving := make(chan error, 1)
	go func() { serving <- p.server.Serve(listener) }() // ends with the server's Close
	p.onClose(func() error { return errors.Join(p.server.Close(), <-serving) })
	return socket, nil
}

// socketPath returns where the database listens: in the peer's folder, or in
// one of its own where that path is too long, or where functions have users of
// their own, who may not find their way into a run folder.
func (p *peer) socketPath() (string, error) {
	dir, err := filepath.Abs(p.dir)
	if err != nil {
		return "", fmt.Errorf("finding the peer's folder: %w", err)
	}
	socket := filepath.Join(dir, socketFile)
	if os.Geteuid() != 0 && len(socket) <= tensordb.MaxSocketPath {
		return socket, nil
	}
	name := sha256.Sum256([]byte(dir))
	folder := fmt.Sprintf("/run/spirt-%x", name[:8]) // found again after a crash
	if os.Geteuid() == 0 {
		if err := os.Mkdir(folder, 0o700); err == nil || errors.Is(err, os.ErrExist) {
			p.onClose(func() error { return os.RemoveAll(folder) })
			return filepath.Join(folder, socketFile), nil
		}
	}
	if folder, err = os.MkdirTemp("", "spirt-"); err != nil {
		return "", fmt.Errorf("making a folder for the database's socket: %w", err)
	}
	p.onClose(func() error { return os.RemoveAll(folder) })
	return filepath.Join(folder, socketFile), nil
}

// newcomers is how many members more than the job starts with there is memory
// for.
const newcomers = 8

// databaseMemory bounds the database in bytes, well above what a run takes:
// samples, a few states, the averages of two slots, the gradients that may
// arrive early, and as much again for what is kept for reuse.
func (p *peer) databaseMemory() int64 {
	model := int64(4 * p.model.NumParams())
	vectors := int64(16 + 3*(p.job.Peers+newcomers) + 2*p.job.Functions.Concurrency)
	samples := int64(len(p.data.Images) + len(p.data.Labels))
	if p.own != nil {
		samples += int64(len(p.own.Images) + len(p.own.Labels))
	}
	limit := 2*(samples+vectors*model) + 64<<20
	if f := p.job.Functions; f.Kind == functionsDatabase { // it computes: a minibatch and its gradient in each slot
		limit += int64(f.Concurrency) * (p.model.MinibatchSize(max(p.job.BatchSize, nn.Chunk)) + model)
	}
	return limit
}

// openFunctions starts the platform that runs this peer's gradient function, or
// has the database compute.
func (p *peer) openFunctions(socket string) error {
	e := &p.computer.base
	e.Model = p.model.Spec()
	e.Scale, e.Offset = p.data.Scale, p.data.Offset
	var err error
	f := p.job.Functions
	if f.Kind == functionsDatabase {
		db, ok := p.db.(trainer)
		if !ok || p.computer.exchange != nil {
			return &UsageError{errors.New("the database has no tensor commands and cannot train: load the module spirt.so (docs/redis.md), or take functions of kind processes")}
		}
		return p.computer.trainIn(db)
	}
	p.platform, err = function.New(function.Config{
		Name: "gradient", Command: []string{p.cfg.Executable, "function"},
		Concurrency: f.Concurrency, MemoryMB: f.MemoryMB, Timeout: f.Timeout, IdleTimeout: 5 * time.Minute, Retries: 3,
		Isolation: p.isolation(socket), Logger: p.log, OnInvocation: p.meter.invocation,
	})
	if err != nil {
		return err
	}
	p.onClose(p.platform.Close)
	p.computer.platform = p.platform
	return nil
}

// isolation is what functions may reach: the database.
func (p *peer) isolation(socket string) function.Isolation {
	switch {
	case socket != "":
		return function.Isolation{Sockets: []string{socket}}
	case p.computer.base.Database.Network == "unix":
		return function.Isolation{Write: []string{p.computer.base.Database.Address}}
	}
	return function.Isolation{Network: true}
}

// maxWarning bounds the text of a warning in bytes.
const maxWarning = 4 << 10

// warn tells the user about something that does not end the run. What caused
// it follows from the errors among args.
func (p *peer) warn(format string, args ...any) {
	cause := ""
	for i, a := range args {
		err, ok := a.(error)
		if !ok {
			continue
		}
		if cause == "" {
			cause = causeOf(err)
		}
		var failed *function.FunctionError
		if errors.As(err, &failed) && failed.Output != "" && p.before(failed.Output) {
			args[i] = fmt.Errorf("%s: %s; its last output was as before", failed.Type, failed.Message)
		}
	}
	p.warnOf(cause, 0, format, args...)
}

// maxOutputs bounds the outputs of functions that are remembered as told.
const maxOutputs = 64

// before reports whether the like of it, numbers aside, was told before: a
// function that crashes for each minibatch tells why once.
func (p *peer) before(output string) bool {
	key := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'f' {
			return -1 // addresses and process numbers
		}
		return r
	}, output)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.outputs[key] {
		return true
	}
	if p.outputs == nil || len(p.outputs) >= maxOutputs {
		p.outputs = map[string]bool{}
	}
	p.outputs[key] = true
	return false
}

// causeOf tells kinds of failure apart; empty where it is none of those that
// have a name.
func causeOf(err error) string {
	var failed *function.FunctionError
	switch {
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, tensordb.ErrDiskFull):
		return events.CauseDisk
	case errors.Is(err, syscall.ENOMEM) || errors.Is(err, tensordb.ErrMemory):
		return events.CauseMemory
	case errors.As(err, &failed) && failed.Type == function.TypeMemory:
		return events.CauseMemory
	case failed != nil:
		return events.CauseFunction
	}
	return ""
}

// warnOf is warn with what caused it and whom it is about, 0 for nobody.
func (p *peer) warnOf(cause string, about int, format string, args ...any) {
	p.warnWith(Event{Cause: cause, About: about}, format, args...)
}

// warnWith is warnOf with more in the event.
func (p *peer) warnWith(e Event, format string, args ...any) {
	message := fmt.Sprintf(format, args...)
	if len(message) > maxWarning { // a function's error may have 256 KB
		message = strings.ToValidUTF8(message[:maxWarning], "") + "..."
	}
	p.log.Warn(message)
	e.Event, e.Message = "warning", message
	p.emit(e)
}

// emit writes an event of this peer. A full disk must not end the training:
// the event is lost, the log says so.
func (p *peer) emit(e Event) {
	if e.Event == "peer" {
		e.By = p.n
	} else {
		e.Peer = p.n
	}
	if err := p.events.Emit(e); err != nil {
		p.log.Error("an event is lost", "event", e.Event, "err", err)
	}
}

// openHost starts listening, leaves this peer's address in the run folder, and
// answers those who ask to take part.
func (p *peer) openHost() error {
	admin, err := openAdmin(p.cfg.Run, p.job, p.ids.rosters)
	if err != nil {
		return err
	}
	p.book, p.told, p.relayed = readAddressBook(p.dir), map[round.Hash]bool{}, make(chan []byte, 8)
	for _, r := range p.ids.rosters.all() {
		p.told[r.Hash()] = true // who connects is greeted with them
	}
	p.petitions = petitions{rosters: p.ids.rosters, admin: admin, relay: p.relay, now: time.Now, contacts: func() []membership.Contact { return contactsOf(p.cfg.Run, p.ids.rosters) }}
	p.host, err = p2p.New(p2p.Config{
		Key: p.ids.key, Listen: []string{p.cfg.Listen}, Members: p.memberKeys(), Job: p.ids.job,
		Check: p.check, Bodies: p.store, Guests: p.guests, Logger: p.log, Limits: p2p.Limits{MessageSize: round.MaxMessageBytes},
	})
	if err != nil {
		return err
	}
	p.onClose(p.host.Close)
	p.dialBook()
	addresses := p.host.Addrs()
	p.reachable = p.reach(addresses)
	return writeFileAtomic(filepath.Join(p.dir, addressFile), []byte(strings.Join(addresses, "\n")+"\n"), 0o644)
}

// reach returns what others are told of where to reach a peer that listens at
// these addresses.
func (p *peer) reach(listening []string) []string {
	var own, loopback []string
	for _, a := range listening {
		switch {
		case strings.HasPrefix(a, "/ip6/fe80"):
		case strings.HasPrefix(a, "/ip4/127.") || strings.HasPrefix(a, "/ip6/::1/"):
			loopback = append(loopback, a)
		default:
			own = append(own, a)
		}
	}
	if own = append(slices.Clone(p.announce), own...); len(own) == 0 {
		own = loopback
	}
	return own[:min(len(own), maxReachable)]
}

// The run folder is looked at for addresses often while somebody is missing,
// and otherwise now and then.
const (
	discoverEvery = 100 * time.Millisecond
	discoverIdle  = 10 // times as long
)

// discover tells the host where the other peers of the run folder listen, also
// after one was started again elsewhere, and looks for rosters that another
// process has put there.
func (p *peer) discover(ctx context.Context) {
	seen := map[uint16]string{}
	for idle := 0; wait(ctx, discoverEvery) == nil; idle++ {
		latest, _ := p.ids.rosters.latest()
		if p.host.Stats().Connected >= len(latest.Members)-1 && idle%discoverIdle != 0 {
			continue
		}
		if _, err := p.ids.rosters.rescan(); err != nil && idle%(60*discoverIdle) == 0 {
			p.warn("a roster in the run folder is of no use: %v", err)
		}
		for _, m := range latest.Members {
			b, err := readFile(filepath.Join(peerDir(p.cfg.Run, int(m.Index)+1), addressFile), 64<<10)
			if err != nil || int(m.Index) == p.n-1 || string(b) == seen[m.Index] {
				continue // it has not started yet
			}
			seen[m.Index] = string(b)
			if err := p.host.SetAddresses(int(m.Index), strings.Fields(string(b))); err != nil {
				p.log.Warn("an address in the run folder is of no use", "peer", m.Index+1, "err", err)
			}
		}
	}
}

// discoverNetwork announces this peer on the local network and looks for
// others there. Where there is no multicast, addresses come from the others.
func (p *peer) discoverNetwork(ctx context.Context) {
	if len(p.reachable) == 0 || strings.HasPrefix(p.reachable[0], "/ip4/127.") || strings.HasPrefix(p.reachable[0], "/ip6/::1/") {
		return // of this machine only
	}
	if err := p2p.Discover(ctx, p.ids.job, p.host.Addrs(), p.found); err != nil {
		p.log.Info("no discovery on the local network", "err", err)
	}
}

// maxOpened bounds the messages that were opened and are not handled yet.
const maxOpened = 4096

// check opens a signed message for the host, and keeps what it found for
// take: signatures are dear.
func (p *peer) check(data []byte) (p2p.Meta, error) {
	m, id, err := round.Open(data, p.ids.job, p.ids.rosters.members)
	if errors.Is(err, round.ErrUnknownRoster) {
		return p2p.Meta{}, fmt.Errorf("%w: %w", p2p.ErrNotYet, err)
	}
	if err != nil {
		return p2p.Meta{}, err
	}
	if n, ok := m.Body.(round.RosterNotice); ok { // before anything that is signed under it
		roster, err := membership.DecodeRoster(n.Data)
		if err != nil {
			return p2p.Meta{}, err
		}
		if _, err := p.ids.rosters.add(roster); err != nil { // perhaps one before it is missing
			return p2p.Meta{}, fmt.Errorf("%w: %w", p2p.ErrNotYet, err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.opened) < maxOpened {
		p.opened[id] = m
	}
	return p2p.Meta{ID: id, From: int(m.From), Slot: m.Slot, Sticky: sticky(m)}, nil
}

// sticky reports whether a message is kept apart for those who come much
// later. Rosters, contacts and petitions are told to who connects instead:
// votes would displace them.
func sticky(m round.Message) bool {
	return m.Type() == round.TypeVote || m.Type() == round.TypeProof
}

// take returns a message that check has accepted.
func (p *peer) take(e p2p.Message) (round.Message, error) {
	p.mu.Lock()
	m, ok := p.opened[e.Meta.ID]
	delete(p.opened, e.Meta.ID)
	if len(p.opened) >= maxOpened {
		clear(p.opened) // of duplicates that nobody took
	}
	p.mu.Unlock()
	if ok {
		return m, nil
	}
	m, _, err := round.Open(e.Data, p.ids.job, p.ids.rosters.members)
	return m, err
}
