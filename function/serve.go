package function

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// Serve answers the Invoke API on address until ctx ends, and then returns nil once the answers under way are written
// or cut off after five seconds. The platform stays open. Listening on anything but a loopback address lets whoever
// reaches it run the function, and has to be allowed by public. Ready, if not nil, is told the address.
func Serve(ctx context.Context, p *Platform, address string, public bool, ready func(net.Addr)) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("serving the Invoke API on %q: %w: choose a free address such as 127.0.0.1:0", address, err)
	}
	if at, err := netip.ParseAddrPort(listener.Addr().String()); !public && (err != nil || !at.Addr().Unmap().IsLoopback()) {
		listener.Close()
		return fmt.Errorf("serving the Invoke API on %q: it is not a loopback address, and whoever reaches it could run the function: use 127.0.0.1, or allow it", address)
	}
	server := &http.Server{
		Handler:           p.InvokeHandler(),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       time.Minute,
		WriteTimeout:      p.cfg.InitTimeout + p.cfg.Timeout + time.Minute, // of a cold invocation and its answer
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
	}
	if ready != nil {
		ready(listener.Addr())
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serving the Invoke API: %w", err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := server.Shutdown(grace); err != nil {
		server.Close()
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving the Invoke API: %w", err)
	}
	return nil
}
