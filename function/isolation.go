package function

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
)

// Isolation says what an instance may touch. Its zero value is the strictest: the executable, what the system has for
// every program to read, and its Runtime API. What of it is kept depends on the system; docs/functions.md has the table,
// and [Platform.Isolation] tells what holds here.
type Isolation struct {
	Off     bool     // instances run as this process's user with all that this user may do
	Read    []string // more files and folders to read and execute; Config.Dir is one without being named
	Write   []string // files and folders to write to as well; where instances have users of their own it has to let these in
	Temp    bool     // a folder of the instance's own, named in TMPDIR and removed at its end
	Network bool     // TCP to anywhere, not only to the Runtime API
	// Sockets are Unix sockets that instances connect to. Where instances have users of their own, each socket and the
	// folder it is in are given to the group of this platform's instances: keep nothing else in that folder.
	Sockets []string
}

// maxRuntimeConns bounds the connections of an instance to its Runtime API; runtimes use one or two.
const maxRuntimeConns = 16

// fewConns is a listener that closes connections beyond maxRuntimeConns at once, so that no instance uses up this
// process's open files.
type fewConns struct {
	net.Listener
	open    atomic.Int32
	refused func()
}

func (l *fewConns) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.open.Add(1) <= maxRuntimeConns {
			return &countedConn{Conn: c, closed: func() { l.open.Add(-1) }}, nil
		}
		l.open.Add(-1)
		c.Close()
		l.refused()
	}
}

type countedConn struct {
	net.Conn
	once   sync.Once
	closed func()
}

func (c *countedConn) Close() error {
	defer c.once.Do(c.closed)
	return c.Conn.Close()
}

var errNotIsolated = errors.New("this system has nothing to isolate functions with")
