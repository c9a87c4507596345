//! Two futures, of which the first to end decides.
use core::future::poll_fn;
use core::pin::pin;
use core::task::Poll;

/// The result of whichever ends first; the other is dropped. `first` is looked at first.
pub async fn race<T>(first: impl Future<Output = T>, second: impl Future<Output = T>) -> T {
    let (mut first, mut second) = (pin!(first), pin!(second));
    poll_fn(|context| match first.as_mut().poll(context) {
        Poll::Ready(value) => Poll::Ready(value),
        Poll::Pending => second.as_mut().poll(context),
    })
    .await
}
